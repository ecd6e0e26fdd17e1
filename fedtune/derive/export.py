"""Export a finished run as one model that other programs load: `fedtune export`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from fedtune.core.bases.find import Base
from fedtune.core.errors import ConfigError
from fedtune.core.files.writing import drafted
from fedtune.core.models.adapter_files import ADAPTER
from fedtune.core.run_folder import has_head
from fedtune.derive.gguf import Stored
from fedtune.derive.model_card import DOSSIER, gguf_metadata, write_card
from fedtune.evidence.dossier.seal import around
from fedtune.evidence.sign import carry
from fedtune.evidence.verify import check_signed, is_signed
from fedtune.runs.run import Run

Kind = Literal["hf", "gguf"]
# Files that are copied from the base unchanged, so that text becomes the same tokens.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)


def export(run: Run, out: Path | str, to: Kind = "hf", stored: Stored | None = None) -> Path:
    """Write a run's base, adapter and head as one model that other programs load; return its path.

    Args:
        run: a finished run with an adapter or a head.
        out: the new transformers folder (hf) or file (gguf).
        to: "hf" for transformers; "gguf" for llama.cpp, which holds language models only.
        stored: the weights' format; by default float32 (hf) or float16 (gguf).

    A run with a head becomes a sequence classifier, which `transformers.pipeline` loads. If
    transformers has no class for it, the folder holds the base and head.safetensors, and the card
    explains their use. Merging is post-processing, so the model's guarantee is that of the run.
    Guarantee: `out` is complete, or it is not made; a classifier's logits were compared with the
    run's.

    A signed run is verified first; the card of an unsigned one says that nobody vouches for it. If
    the run is in a dossier, the dossier is verified, and copied into a transformers folder.

    Errors: NotGenuine (the run was changed after it was signed); InputError; ConfigError (nothing
    to merge, `out` exists, or the format cannot hold the model); ModelError;
    InfrastructureError."""
    stored = stored or ("float32" if to == "hf" else "float16")
    if to == "hf" and stored == "q8_0":
        raise ConfigError(
            "--dtype q8_0 is a number format of GGUF only", "float32, bfloat16 or float16"
        )
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists", "a new name", "choose another --out")
    signed, dossier = is_signed(run.folder), around(run.folder)
    if signed:
        check_signed(dossier or run.folder)
        run = Run(run.folder)  # read again, as it was verified
    report = run.report
    headed = has_head(run.folder)
    _check(run, headed, to, stored)
    with drafted(out) as draft:
        if headed:
            from fedtune.derive.export_head import write_headed

            base, use = write_headed(run, draft, stored)
            write_card(draft, run, report, base, use)
        elif to == "hf":
            base = _write_merged(run, draft, stored)
            write_card(draft, run, report, base)
        else:
            from fedtune.derive.gguf import write_gguf

            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as name:
                base = _write_merged(run, Path(name), "float32")
                facts = gguf_metadata(report, base, signed)
                write_gguf(Path(name), draft, stored, facts, base.licence)
        if signed and to == "hf":
            carry(run.folder, draft)
        if dossier and to == "hf":
            shutil.copytree(dossier, draft / DOSSIER, symlinks=True)
    return out


def _check(run: Run, headed: bool, to: Kind, stored: Stored) -> None:
    """Check that the chosen format can hold what the run trained: an adapter or a head.

    - run: the run to export
    - headed: whether the run trained a head
    - to: the format of the model, "hf" or "gguf"
    - stored: the format of its weights, such as "float32"

    Errors: ConfigError."""
    predict = f"`fedtune predict {run.folder} --data FILE` uses it as it is"
    if headed and to == "gguf":
        raise ConfigError(
            f"{run.folder}: trained a head, which a language model cannot hold",
            "a run of a language model, or --to hf",
            predict,
        )
    if headed and stored == "float16":
        raise ConfigError(
            "--dtype float16: a classifier's weights may be too large for it",
            "float32 or bfloat16",
        )
    if not headed and not (run.folder / "adapter" / ADAPTER).is_file():
        raise ConfigError(f"{run.folder}: holds no adapter and no head", "a finished run")


def _write_merged(run: Run, into: Path, stored: str) -> Base:
    """Merge a run's adapter into its base, and write the model and the base's own tokenizer files.
    Return the base.

    - run: a finished run of a language model
    - into: the folder in which the files are written
    - stored: the format of the weights, such as "float32"; they are merged in fp32 and then
      converted to it

    Errors: ConfigError, ModelError."""
    import torch

    from fedtune.core.models.loaded import load

    loaded = load(run.folder, dtype=torch.float32)
    if loaded.base.kind != "causal":
        raise ConfigError(
            f"{run.folder}: its base is of the kind {loaded.base.kind}", "a run of a language model"
        )
    merged: Any = loaded.model.merge_and_unload().to(getattr(torch, stored))
    merged.save_pretrained(str(into))
    for name in (*TOKENIZER, "generation_config.json"):
        if (loaded.base.path / name).is_file():
            shutil.copyfile(loaded.base.path / name, into / name)
    return loaded.base
