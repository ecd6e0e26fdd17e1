"""Write the files that accompany an exported model (its card and its report), and build the
metadata of a GGUF file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.core.bases.find import Base
from fedtune.core.config import Study
from fedtune.core.config.known_bases import upstream_of
from fedtune.core.files import reading
from fedtune.core.models.adapter_files import AGAIN
from fedtune.core.registry.rounding import rounded_up
from fedtune.evidence.dossier.seal import around
from fedtune.evidence.verify import is_signed
from fedtune.report.claim import shared_line
from fedtune.report.declared import site_lines
from fedtune.report.run_files import pipeline_tag
from fedtune.runs.run import Run

DOSSIER = "dossier"  # in an exported model: a copy of the dossier that held its run


TEXT = ('    AutoModelForCausalLM.from_pretrained("THIS FOLDER")',)  # how it is loaded


def privacy_line(report: dict[str, Any], signed: bool = True) -> str:
    """Return one line for a model card with the privacy guarantee that the report states. The line
    also says if nobody signed the report, or if the cost of the run's teacher is not in the
    guarantee, and names the sites whose data the guarantee does not cover, or whose data is of no
    patient.

    - report: the run's report
    - signed: whether the report was signed"""
    said = site_lines(report)
    more = f". {said}".removesuffix(".") if said else ""
    if not report.get("private"):
        return f"NOT PRIVATE: it may repeat the records that it was trained on{more}"
    p = report["privacy"]
    unsigned = "" if signed else "by a report that nobody signed, "
    if shared := shared_line(p):
        more = f", {shared}{more}"
    return (
        f"{unsigned}differentially private: ε = {rounded_up(p.get('epsilon'))}, "
        f"δ = {p.get('delta')} "
        f"for one {p.get('unit')} at any one site ({p.get('relation')}){more}"
    )


def gguf_metadata(report: dict[str, Any], base: Base, signed: bool = True) -> dict[str, str]:
    """Return the texts that describe a model in a GGUF file: {"name", "description"}, for the keys
    general.name and general.description.

    - report: the run's report
    - base: the base, whose name the description gives
    - signed: whether the run is signed"""
    return {
        "name": str(report.get("study")),
        "description": f"{base.name} fine-tuned with fedtune; {privacy_line(report, signed)}",
    }


def _quantisation_note(study: Study) -> list[str]:
    """Return lines for the card which say that the weights come from a quantised base; [] if the
    base was not quantised."""
    table = study.base.quantisation
    if table is None:
        return []
    return [
        "",
        f"It was trained on the base quantised to {table.method}. These weights are the quantised "
        "ones, written out as plain numbers, with the adapter added.",
    ]


def _template(study: Study) -> list[str]:
    """Return lines for the card with the template that was put around prompts in training; a model
    may give no answer without it. Return [] if there was no template."""
    template = study.objective.template
    if not template or study.objective.resolved.record_format == "label":
        return []
    return [
        "",
        "It was trained on prompts in this template, and expects it:",
        "",
        *(f"    {line}" for line in template.splitlines()),
    ]


def _dossier(run: Run) -> list[str]:
    """Return lines for the card which say where the copy of the run's dossier is; [] if the run is
    in no dossier."""
    if around(run.folder) is None:
        return []
    return [
        "",
        f"What it was trained on, what its guarantee covers and who approved it: {DOSSIER}/. "
        f"`fedtune verify {DOSSIER} --trust FINGERPRINT` checks it, offline.",
    ]


def _origin(base: Base) -> list[str]:
    """Return lines for the card with the origin of a base that comes from a wheel; [] for other
    bases."""
    upstream = upstream_of(base.name)
    return [] if upstream is None else ["", f"Base: {base.name}, which is {upstream}."]


def write_card(
    folder: Path, run: Run, report: dict[str, Any], base: Base, use: Sequence[str] = TEXT
) -> None:
    """Write the files that accompany an exported model: README.md (with the fields that hubs read,
    how to load the model, and the run's report), report.json, and a copy of the run's figure.

    - folder: the folder of the exported model, in which the files are written
    - run: the finished run, whose report.md and progress.png are read
    - report: the content of the run's report.json
    - base: the base on which the run trained, for its name and licence
    - use: the lines that say how to load the model; by default those for a language model

    Errors: InputError, OSError."""
    text = reading.text(run.folder / "report.md", "the report of a finished run", AGAIN)
    report_lines = text.splitlines()
    upstream = upstream_of(base.name)
    claim = privacy_line(report, is_signed(run.folder))
    head = {
        "license": base.licence.lower() if base.licence != "unknown" else "unknown",
        "base_model": upstream.model if upstream else base.name,
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag(run.folder),
        "tags": ["fedtune", "federated-learning"]
        + (["differential-privacy"] if report.get("private") else ["not-private"]),
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [
        f"# {report.get('study')}: {base.name}, fine-tuned",
        "",
        f"Base and what was trained as one model; {claim}. The base's licence "
        f"({base.licence}) holds for this model too.",
        *_origin(base),
        *_quantisation_note(run.study),
        *_dossier(run),
        "",
        *use,
        *_template(run.study),
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
