"""Begin a run's folder, and read the report in a finished one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files import reading
from fedtune.core.run_folder import has_head

# The keys of a report that readers may require, and their types; an outer key before its inner
# ones.
REPORT = {"private": bool, "study": str, "privacy": dict, "base": dict}
REPORT |= {"base.name": str, "base.digest": str}


def pipeline_tag(run: Path) -> str:
    """Return the name that a model hub uses for the task of a finished run's model:
    "text-classification" if it has a head, which gives labels or a score, else
    "text-generation"."""
    return "text-classification" if has_head(run) else "text-generation"


def check_new(out: Path) -> None:
    """Check that nothing is at the path `out`. Errors: ConfigError if it exists."""
    if out.exists():
        raise ConfigError(f"{out}: exists", "a new folder", "choose another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A context manager that makes the new folder `out` with all its content or not at all: it
    yields the path of an empty draft folder, which is renamed to `out` if the block succeeds, and
    removed otherwise.

    Errors: ConfigError if `out` exists, InfrastructureError if the disk refuses."""
    from fedtune.core.files.writing import drafted

    check_new(out)
    with drafted(out) as draft:
        draft.mkdir()
        yield draft


def read_report(run: Path, *needed: str) -> dict[str, Any]:
    """Read a finished run's report.json. needed: the keys, among those of REPORT, that the report
    must have; it must have "privacy" in any case.

    Errors: InputError if there is no report, a needed key is missing, or a key of REPORT has a
    value of another type."""
    path, expected = run / "report.json", "the report of a finished run"
    todo = "finish the run with --resume; if the file is damaged, copy it again"
    report = reading.json_in(path, expected, todo)
    for key, kind in REPORT.items():
        outer, _, last = key.rpartition(".")
        table = report.get(outer, {}) if outer else report
        if (last in table or key in ("privacy", *needed)) and not isinstance(table.get(last), kind):
            raise InputError(
                f"{path}: {key} is missing, or its value is of another type", expected, todo
            )
    return report
