"""Compose a dossier's model card, README.md, in the format of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.core.config.known_bases import upstream_of
from fedtune.core.registry.rounding import number
from fedtune.evidence.dossier.markdown import body
from fedtune.report.run_files import pipeline_tag
from fedtune.report.text import cell

SECTIONS = ("summary", "model", "privacy")
USE = """\
The trained weights are in run/adapter. `fedtune predict` and `fedtune generate` use the folder run
as it is, and `fedtune export` makes one model of base and weights. {peft}

`fedtune verify THIS-FOLDER --trust FINGERPRINT` checks all of this folder, offline. dossier.html
has the rest: training-data disclosure, the annex to an impact assessment, and what each file is."""
PEFT = (
    'PEFT loads a low-rank adapter: `PeftModel.from_pretrained(base, "THIS-FOLDER/run/adapter")`.'
)


def card(content: Mapping[str, Any], found: Mapping[str, Any], run: Path) -> str:
    """Return the model card of a dossier as Markdown.

    - content: the content of dossier.json
    - found: the run's documents by file name
    - run: the run's folder, whose files say for which task the model is"""
    lora = bool(found["plan.json"].get("lora"))
    head = _head(found["report.json"], task=pipeline_tag(run), lora=lora)
    return f"---\n{head}\n---\n\n{card_body(content, found)}"


def card_body(content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return the model card as Markdown, without its head, the YAML text at the top. content: the
    content of dossier.json; found: the run's documents by file name."""
    report, plan = found["report.json"], found["plan.json"]
    texts = {section["id"]: section for section in content["sections"]}
    parts = [
        f"# {cell(report['study'])}: fine-tuned across sites",
        USE.format(peft=PEFT if plan.get("lora") else "").rstrip(),
    ]
    for name in SECTIONS:
        parts.append(f"## {texts[name]['title']}")
        parts.append(body(texts[name]["blocks"]).rstrip())
    return "\n\n".join(parts) + "\n"


def _head(report: Mapping[str, Any], *, task: str, lora: bool) -> str:
    """Return the model card's head: the YAML text at the top, with the fields that the hub defines.
    The same run always gives the same text, so that `verify` can compare it.

    report: the content of report.json; task: the hub's name of what the model does; lora: whether
    the run trained a LoRA adapter."""
    import yaml  # type: ignore[import-untyped]

    base = report["base"]
    upstream = upstream_of(base["name"])
    quality, study = report.get("quality") or {}, str(report["study"])
    after = quality.get("after")
    measured = measures(after if isinstance(after, dict) else {})
    result = {
        "task": {"type": task},
        "dataset": {"name": f"{study}: held-out records at the coordinator", "type": "held-out"},
        "metrics": [{"type": name, "value": value} for name, value in sorted(measured.items())],
    }
    private = "differential-privacy" if report.get("private") else "not-private"
    licence = str(base.get("licence", "unknown"))
    known = licence.lower() in LICENCES
    fields = {
        "base_model": upstream.model if upstream else _hub_id(base["name"]),
        "library_name": "peft" if lora else "fedtune",
        "license": licence.lower() if known else "other",
        "license_name": None if known else licence,
        "pipeline_tag": task,
        "tags": ["fedtune", "federated-learning", private],
        "model-index": [{"name": study, "results": [result]}] if measured else None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)).strip()


def measures(after: Mapping[str, Any]) -> dict[str, float]:
    """Return metric -> value for those entries of `after` that are numbers, except the round's
    number. after: what a report says of the model's quality after the study.

    >>> measures({"loss": 2.5, "round": 3, "kl": None})
    {'loss': 2.5}"""
    values = {name: number(value) for name, value in after.items() if name != "round"}
    return {name: value for name, value in values.items() if value is not None}


LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", "llama3.2", "gemma"}


def _hub_id(name: str) -> str | None:
    """Return a base's name if it can be an id of the Hugging Face hub. Return None if it cannot,
    for example because it is a folder of this machine."""
    return None if ":" in name or name.startswith(("/", ".")) or name.count("/") > 1 else name
