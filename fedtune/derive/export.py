"""A finished run as one model for others' programs: `fedtune export`."""

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
    """Make base and adapter of a run one model that other programs load; returns its path.

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
            base = _folder(run, draft, stored)
            _card(draft, run, report, base)
        else:
            from fedtune.derive.gguf import write_gguf

            with tempfile.TemporaryDirectory(dir=out.parent, prefix=".exporting-") as name:
                base = _folder(run, Path(name), "float32")
                write_gguf(Path(name), draft, stored, _about(report, base), base.licence)
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


def _folder(run: Run, into: Path, stored: str) -> Base:
    """The merged model with the base's own tokenizer files; merged in fp32, then stored."""
    import torch

    from fedtune.models.loaded import load

    whole = load(run.folder, dtype=torch.float32)
    if whole.base.kind != "causal":
        raise ConfigError(f"{run.folder}: its base is an encoder", "a run of a language model")
    merged: Any = whole.model.merge_and_unload().to(getattr(torch, stored))
    merged.save_pretrained(str(into))
    for name in (*TOKENIZER, "generation_config.json"):
        if (whole.base.path / name).is_file():
            shutil.copyfile(whole.base.path / name, into / name)
    return whole.base


# ------------------------------------------------------------------------------------- labels


def _claim(report: dict[str, Any]) -> str:
    """One line about privacy, as strong as the report's."""
    if not report.get("private"):
        return "NOT PRIVATE: it may repeat the records that it was trained on"
    p = report["privacy"]
    return (
        f"differentially private: ε = {rounded_up(p.get('epsilon'))}, δ = {p.get('delta')} "
        f"for one {p.get('unit')} at any one site ({p.get('relation')})"
    )


def _about(report: dict[str, Any], base: Base) -> dict[str, str]:
    return {
        "name": str(report.get("study")),
        "description": f"{base.name} fine-tuned with fedtune; {_claim(report)}",
    }


def _origin(study: Study) -> list[str]:
    """Whose weights these are, where they are not the base's own."""
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
    found = text.splitlines()
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
        f"Base and adapter as one model; {_claim(report)}. The base's licence ({base.licence}) "
        "holds for this model too.",
        *_origin(run.study),
        "",
        '    AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        "",
        *found[1:],  # its own title is above
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = run.study.base.quantisation
    if table:
        report = report | {"base": report["base"] | {"quantisation": table.model_dump()}}
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    if (run.folder / "progress.png").is_file():
        shutil.copyfile(run.folder / "progress.png", folder / "progress.png")
