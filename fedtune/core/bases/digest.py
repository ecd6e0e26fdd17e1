"""Hash everything in a base's folder that decides what the base computes; refuse unsafe folders
before any of their files is read.

The digest does not depend on how files are laid out (shards, key order, file names), only on what a
site would compute with them:

    tensors     name, dtype, shape and sha256 of the bytes, sorted by name
    config      canonical JSON without keys that say who wrote it and when
    processor   of a base that reads images or sound: canonical JSON of its preprocessing
    tokenizer   canonical JSON of tokenizer.json, but not the padding and truncation that its last
                call left there; the chat template; the bos, eos and pad tokens; and Whisper's
                language and task

A base's tokenizer is made of these parts alone (`read_tokenizer`), whatever else the folder holds.
A folder with further chat templates is refused, since other programs may use one of them in place
of the hashed template. A processor's chat template (chat_template.json) is never loaded."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.errors import ModelError
from fedtune.core.files import reading

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # in transformers' own order
VOLATILE = ("transformers_version", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype")
EXPECTED = "a folder with config.json, safetensors weights and tokenizer.json"
SAVE = "save model and tokenizer into one folder with save_pretrained"
OPENED = (".json", ".jinja", ".safetensors", ".txt", ".model")
AGAIN = "fetch or copy the file again"
SETTLED = 2  # seconds: far longer than a file system's clock takes to tick
_read: dict[Path, tuple[list[tuple[str, int, int, int, int]], str]] = {}
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Files where auto_map can ask for remote code.
CODE = ("config.json", "tokenizer_config.json", *PROCESSORS)
# Where transformers finds the name of another file that it then reads in place of the hashed one.
REDIRECTS = {
    "config.json": ("configuration_files", "transformers_weights"),
    "tokenizer_config.json": ("fast_tokenizer_files",),
}
TEMPLATES = "additional_chat_templates"  # a folder whose default.jinja transformers prefers
# Keys by which a configuration asks for layers or attention that are not transformers' own. Loading
# one with the last key changes classes of transformers for the whole process.
LAYERS = ("attn_implementation", "_attn_implementation", "fusion_config")
# None: a part of the configuration that names no attention. With other values transformers looks
# for a package or, with a value such as "owner/name", for a repository of kernels.
ATTENTION = (None, "eager", "sdpa")
# By these Whisper's tokenizer_config.json chooses the tokens that a transcript begins with.
START = ("language", "task", "predict_timestamps")
# Names of weights that some loader reads, in whatever format.
WEIGHTS = (
    "*.safetensors",
    *("*model*.bin", "*model*.pt", "*model*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf"),
)


def digest(folder: Path) -> str:
    """Return the digest of what `folder` computes, as "sha256:<64 hex>". Hashing takes 1 to 4 s per
    GB.

    A folder is hashed once per process. It is hashed again if the change time of one of its files,
    which cannot be set back, shows that the file was changed or replaced. A folder with a file that
    changed in the last seconds is always hashed. Errors: ModelError if the folder is refused (see
    `check`) or a file cannot be read."""
    files = _stamps(folder) if folder.is_dir() else []
    cached_stamps, value = _read.get(folder, (None, ""))
    if cached_stamps != files:
        check(folder)
        value = _digest(folder)
        settled = all(changed < time.time_ns() - SETTLED * 10**9 for *_, changed in files)
        if settled and files == _stamps(folder):
            _read[folder] = files, value
    return value


@contextmanager
def unchanged(folder: Path, expected: str) -> Iterator[None]:
    """Check after the block that `folder` still has the digest `expected` and that none of its
    files changed meanwhile. Without this check a file could be changed after it was hashed, read by
    the block, and changed back. It costs a look at the files' change times. Errors: ModelError."""
    before = _stamps(folder)
    yield
    if digest(folder) != expected or _stamps(folder) != before:
        raise ModelError(
            f"{folder.name}: its files were changed since they were hashed",
            expected,
            "see that nothing writes into a base's folder, and start again",
        )


def _stamps(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Return for each file of a folder what shows whether it was changed or replaced: its name,
    device, inode number, size and change time (ns). Errors: ModelError if a file that transformers
    may open is not a regular file: a pipe would block for ever."""
    entries = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.suffix in OPENED:
            reading.regular(path, EXPECTED, AGAIN, ModelError)
        entries.append((path.name, path.stat()))
    return [(n, s.st_dev, s.st_ino, s.st_size, s.st_ctime_ns) for n, s in entries]


def _digest(folder: Path) -> str:
    manifest = {
        "tensors": {name: _hash_tensor(t) for name, t in read_tensors(folder).items()},
        "config": {k: v for k, v in read_json(folder / "config.json").items() if k not in VOLATILE},
        "tokenizer": read_tokenizer(folder),
    }
    processors = {name: read_json(folder / name) for name in PROCESSORS if _has_file(folder, name)}
    if processors:
        manifest["processor"] = processors
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _has_file(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def check(folder: Path) -> None:
    """Refuse a folder that is not a plain base: only what `digest` hashes may decide what is
    computed. No pickle and no remote code is ever opened.

    Errors: ModelError for pickled weights only, remote code, a quantised checkpoint, an adapter in
    the folder (transformers would apply it silently), a file that transformers would read in place
    of a hashed one, other weights or chat templates beside the hashed ones, layers or attention
    that are not transformers' own, or a missing file."""
    for name in CODE:
        if _first_key(folder / name, "auto_map"):
            raise ModelError(
                f"{folder.name}: {name} asks for remote code (auto_map)",
                "an architecture that transformers has built in",
                "choose another base; fedtune never runs a model's own code",
            )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder.name}: is an adapter, or holds one beside the base",
            "a base model alone",
            "merge the adapter into its base and save that, or name the base",
        )
    for name, keys in REDIRECTS.items():
        if key := _first_key(folder / name, *keys):
            raise ModelError(
                f"{folder.name}: {name} names other files to read in its place ({key})",
                "files that are read under their own names, which the digest covers",
                SAVE,
            )
    if os.path.lexists(folder / TEMPLATES):
        raise ModelError(
            f"{folder.name}: holds chat templates that the digest does not cover ({TEMPLATES})",
            "one chat template, in chat_template.jinja or tokenizer_config.json",
            f"delete {TEMPLATES}, or copy the base without it and name the copy",
        )
    asked = settings_in(read_json(folder / "config.json"), *LAYERS)
    if untried := sorted(name.lstrip("_") for name, value in asked if value not in ATTENTION):
        raise ModelError(
            f"{folder.name}: its configuration asks for layers or attention that fedtune has not "
            f"tried ({untried[0]})",
            "transformers' own layers, with sdpa or eager attention",
            "take the setting out of config.json, or choose another base",
        )
    if _first_key(folder / "config.json", "quantization_config"):
        raise ModelError(f"{folder.name}: is quantised", "float weights", "name the original model")
    others = {path for pattern in WEIGHTS for path in folder.glob(pattern)} - set(weights(folder))
    if others:
        raise ModelError(
            f"{folder.name}: holds weights that the digest does not cover ({min(others).name})",
            f"{SINGLE}, or the shards that {INDEX} names, and no other weights",
            "delete them, or copy the base without them and name the copy",
        )
    if not isinstance(read_json(folder / "tokenizer.json").get("model"), dict):
        raise ModelError(f"{folder.name}: tokenizer.json holds no tokenizer", EXPECTED, SAVE)


def settings_in(config: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """Find settings anywhere in a configuration: yield (name, value) for each of `names` that is a
    key of the configuration or of a part of it, at any depth. The parts are searched because
    transformers also obeys the settings of the text part and of the image or audio part."""
    if isinstance(config, dict):
        yield from ((name, config[name]) for name in names if name in config)
        config = list(config.values())
    if isinstance(config, list):
        for part in config:
            yield from settings_in(part, *names)


def _first_key(path: Path, *names: str) -> str:
    """Return the first of `names` that is found as a key of a JSON file, at any depth; "" if none
    is found, or there is no such file. Errors: ModelError if the file is not a JSON object."""
    found = settings_in(read_json(path), *names) if path.is_file() else iter(())
    return next((name for name, _ in found), "")


def weights(folder: Path) -> list[Path]:
    """Return the safetensors files of a base: the single file, else the shards that the index
    names. Errors: ModelError."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))
        problem = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise ModelError(
            f"{folder.name}: {problem}",
            f"{SINGLE}, or shards with {INDEX}",
            "load the model where you trust it and save_pretrained(…) it as safetensors",
        )
    listed = read_json(folder / INDEX).get("weight_map")
    shards: set[Any] = set()
    if isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values()):
        shards = set(listed.values())
    if not shards:
        raise ModelError(f"{folder / INDEX}: its weight_map names no shards", EXPECTED, AGAIN)
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(
                f"{folder.name}: {INDEX} names a shard that is not in the folder", EXPECTED, AGAIN
            )
    return [folder / name for name in sorted(shards)]


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`. Errors: ModelError naming the file."""
    if not os.path.lexists(path):
        raise ModelError(f"{path.parent.name}: has no {path.name}", EXPECTED, SAVE)
    return reading.json_in(path, EXPECTED, AGAIN, ModelError, reading.LARGE)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the safetensors files of a base, and return its tensors by name. These tensors are what
    the digest covers and what is loaded. Errors: ModelError."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in weights(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    if name in tensors:
                        raise ModelError(f"{folder.name}: two shards hold the tensor {name}")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError, MemoryError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({type(error).__name__})", todo=AGAIN
            ) from None
    return tensors


def _hash_tensor(tensor: torch.Tensor) -> list[Any]:
    import torch

    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(memoryview(raw)).hexdigest()]


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Read the parts of a base's tokenizer that are hashed, and from which alone the tokenizer is
    built. Return them as "json", the content of tokenizer.json; "chat_template", None if there is
    none; and "special", the bos, eos and pad tokens and the settings that START names, under
    transformers' names. Errors: ModelError."""
    tokenizer = read_json(folder / "tokenizer.json")
    for key in ("padding", "truncation"):  # left over from the last call, set again at each call
        tokenizer.pop(key, None)
    older, newer = (
        read_json(folder / name) if _has_file(folder, name) else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    config = older | newer
    jinja = folder / "chat_template.jinja"
    template = config.get("chat_template")
    if os.path.lexists(jinja):
        template = reading.text(jinja, "a chat template", AGAIN, ModelError)
    special = _special(config) | {key: config[key] for key in START if config.get(key)}
    # If tokenizer_config.json lacks this key, transformers prefers special_tokens_map.json.
    preferred = {} if "added_tokens_decoder" in newer else _special(older)
    if any(token not in (None, special[key]) for key, token in preferred.items()):
        raise ModelError(
            f"{folder.name}: special_tokens_map.json names other bos, eos or pad tokens than "
            "tokenizer_config.json",
            "one bos, one eos and one pad token",
            "delete special_tokens_map.json, or copy the base without it and name the copy",
        )
    return {"json": tokenizer, "chat_template": template, "special": special}


def _special(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: token.get("content") if isinstance(token := config.get(key), dict) else token
        for key in ("bos_token", "eos_token", "pad_token")
    }
