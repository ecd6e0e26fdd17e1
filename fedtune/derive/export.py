"""Export a finished run as one merged model: `fedtune export`."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from fedtune.bases.find import Base
from fedtune.config import Study
from fedtune.derive.gguf import Stored
from fedtune.errors import ConfigError
from fedtune.files import reading
from fedtune.files.writing import drafted
from fedtune.models.adapter_files import ADAPTER, AGAIN, HEAD
from fedtune.models.run import Run
from fedtune.report.claim import rounded_up

Kind = Literal["hf", "gguf"]
# Copied from the base as they are, so that text becomes the same tokens.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)


def export(run: Run, out: Path | str, to: Kind = "hf", stored: Stored | None = None) -> Path:
    """Merge a run's base and adapter into one model that other programs load; returns its path.

    Args:
        out: the new transformers folder (hf) or file (gguf).
        stored: how the weights are kept; without it float32 (hf), float16 (gguf).

    Merging is post-processing: the model's guarantee is the run's. Guarantee: `out` is whole or not
    there.

    Errors: InputError, ConfigError (no language model; `out` exists; the format cannot hold it),
    ModelError, InfrastructureError."""
    stored = stored or ("float32" if to == "hf" else "float16")
    if to == "hf" and stored == "q8_0":
        raise ConfigError("--dtype q8_0: a storage of GGUF", "float32, bfloat16 or float16")
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: exists", "a new name", "choose another --out")
    report = run.report
    _check(run)
    with drafted(out) as draft:
        if to == "hf":
            base = _write_merged(run, draft, stored)
            _card(draft, run, report, base)
        else:
            from fedtune.derive.gguf import write_gguf

            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as name:
                base = _write_merged(run, Path(name), "float32")
                write_gguf(Path(name), draft, stored, _gguf_metadata(report, base), base.licence)
    return out


def _check(run: Run) -> None:
    """Errors: ConfigError where the run is no language model with an adapter."""
    adapter = run.folder / "adapter"
    headed = run.study.lora is None or not (adapter / ADAPTER).is_file()
    if headed or (adapter / HEAD).is_file():
        raise ConfigError(
            f"{run.folder}: trained a head, which is no part of a language model",
            "a run of a language model",
            f"{adapter} holds it: {HEAD}, and the adapter (if any) for PEFT",
        )


def _write_merged(run: Run, into: Path, stored: str) -> Base:
    """The merged model with the base's own tokenizer files; merged in fp32, then stored."""
    import torch

    from fedtune.models.loaded import load

    loaded = load(run.folder, dtype=torch.float32)
    if loaded.base.kind != "causal":
        raise ConfigError(f"{run.folder}: its base is an encoder", "a run of a language model")
    merged: Any = loaded.model.merge_and_unload().to(getattr(torch, stored))
    merged.save_pretrained(str(into))
    for name in (*TOKENIZER, "generation_config.json"):
        if (loaded.base.path / name).is_file():
            shutil.copyfile(loaded.base.path / name, into / name)
    return loaded.base


# ------------------------------------------------------------------------------------- labels


def _privacy_line(report: dict[str, Any]) -> str:
    """One line with the report's privacy guarantee."""
    if not report.get("private"):
        return "NOT PRIVATE: it may repeat the records that it was trained on"
    p = report["privacy"]
    return (
        f"differentially private: ε = {rounded_up(p.get('epsilon'))}, δ = {p.get('delta')} "
        f"for one {p.get('unit')} at any one site ({p.get('relation')})"
    )


def _gguf_metadata(report: dict[str, Any], base: Base) -> dict[str, str]:
    return {
        "name": str(report.get("study")),
        "description": f"{base.name} fine-tuned with fedtune; {_privacy_line(report)}",
    }


def _quantisation_note(study: Study) -> list[str]:
    """State that the weights are those of a quantised base, where they are."""
    table = study.base.quantisation
    if table is None:
        return []
    return [
        "",
        f"It was trained on the base quantised to {table.method}. These weights are the quantised "
        "ones, written out as plain numbers, with the adapter added.",
    ]


def _card(folder: Path, run: Run, report: dict[str, Any], base: Base) -> None:
    """README.md: what hubs read, how to load it, and the run's report."""
    text = reading.text(run.folder / "report.md", "the report of a finished run", AGAIN)
    report_lines = text.splitlines()
    head = {
        "license": base.licence.lower() if base.licence != "unknown" else "unknown",
        "base_model": base.name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fedtune", "federated-learning"]
        + (["differential-privacy"] if report.get("private") else ["not-private"]),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [
        f"# {report.get('study')}: {base.name}, fine-tuned",
        "",
        f"Base and adapter as one model; {_privacy_line(report)}. The base's licence "
        f"({base.licence}) holds for this model too.",
        *_quantisation_note(run.study),
        "",
        '    AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        "",
        *report_lines[1:],  # its own title is above
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = run.study.base.quantisation
    if table:
        report = report | {"base": report["base"] | {"quantisation": table.model_dump()}}
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    if (run.folder / "progress.png").is_file():
        shutil.copyfile(run.folder / "progress.png", folder / "progress.png")
