"""Write the report of a run: report.json for machines, report.md for people, progress.png as a
picture."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fedtune.core.files.writing import replace

BANNER = "NOT PRIVATE"
__all__ = ["BANNER", "jsonable", "write"]


def write(out: Path, report: dict[str, Any]) -> None:
    """Write the dict `report` to the folder `out` as report.json, report.md and progress.png. Each
    file is replaced as a whole, so a reader never sees half a file.

    In the JSON, quality.headline holds the sentences about quality that every page shows. The JSON
    is canonical: keys are sorted, the encoding is UTF-8, and a number that is not finite becomes
    the text "nan" or "inf". Errors: InfrastructureError if the folder cannot be written."""
    # Imported here, since commands that only read reports need none of these three.
    from fedtune.report.gain import headline
    from fedtune.report.markdown import markdown
    from fedtune.report.plot import png

    body = jsonable(report)
    if said := [line.text for line in headline(body.get("quality") or {})]:
        body["quality"]["headline"] = said
    if not body.get("private", False):
        body["banner"] = BANNER
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    replace(out / "report.json", (text + "\n").encode())
    replace(out / "report.md", markdown(body).encode())
    replace(out / "progress.png", png(body))


def jsonable(value: Any) -> Any:
    """Convert a value to JSON's own types. A number that is not finite becomes the text "nan" or
    "inf", a dataclass an object, and a set a sorted list. Any other value, such as a path, becomes
    text.

    >>> jsonable({"a": (1, float("inf"))})
    {'a': [1, 'inf']}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [jsonable(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if hasattr(value, "item"):  # a NumPy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
