"""The report of a run: report.json for machines, report.md for people, progress.png at a glance."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedtune.files.writing import replace
from fedtune.report.markdown import markdown
from fedtune.report.plot import png

BANNER = "NOT PRIVATE"
__all__ = ["BANNER", "write"]


def write(out: Path, report: dict[str, Any]) -> None:
    """Write report.json, report.md and progress.png to `out` from one dict; each file is replaced
    whole or not at all, so a reader never sees half a report.

    The JSON is canonical: keys sorted, UTF-8, numbers finite (others become "nan" or "inf").
    Errors: InfrastructureError where the folder cannot be written."""
    jsonable = _jsonable(report)
    if not jsonable.get("private", False):
        jsonable["banner"] = BANNER
    text = json.dumps(jsonable, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    replace(out / "report.json", (text + "\n").encode())
    replace(out / "report.md", markdown(jsonable).encode())
    replace(out / "progress.png", png(jsonable))


def _jsonable(value: Any) -> Any:
    """The same value in JSON's own types."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_jsonable(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
