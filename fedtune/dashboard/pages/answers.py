"""Read a run's answers.json, the answers of base and adapter to public records, for a page. Values
of an unexpected form are left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError
from fedtune.core.files import reading
from fedtune.core.registry.rounding import number
from fedtune.core.run_folder import ANSWERS
from fedtune.observe.log import MOMENT

MOST, LONGEST = 20, 1500  # the most prompts, and the most characters of a text, that are shown


def answers_in(run: Path) -> dict[str, Any]:
    """Read a run's answers to public records, for the page. Return a dict:

    - "made": the time at which the answers were made; "" if this time is malformed
    - "rows": a dict for each of at most MOST prompts, with the texts "prompt" and "expected", and
      with the answers "base" and "adapter" as `_answer` returns them

    Return {} if there are no answers, or if they were made with another version of the adapter;
    {"error": text} if the file is damaged."""
    path = run / ANSWERS
    if not path.exists():
        return {}
    try:
        found = reading.json_in(path, "answers of base and adapter")
    except FedtuneError as error:
        return {"error": str(error)}
    link, rows = run / "adapter", found.get("answers")
    version = os.readlink(link) if link.is_symlink() else ""
    if found.get("version") != version or not isinstance(rows, list):
        return {}
    made = str(found.get("made"))
    return {
        "made": made if MOMENT.fullmatch(made) else "",
        "rows": [_row(row) for row in rows[:MOST] if isinstance(row, dict)],
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    expected = _text(row.get("expected"))
    sides = {name: _answer(row.get(name), expected) for name in ("base", "adapter")}
    return {"prompt": _text(row.get("prompt")), "expected": expected, **sides}


def _answer(side: Any, expected: str) -> dict[str, Any]:
    """Read one model's answer to one prompt. Return a dict: "text" is the answer; "share" is the
    probability that the model gave it, None if the answer is no label; "right" says whether it is
    the expected label, None if that is not known."""
    side = side if isinstance(side, dict) else {}
    text, share = _text(side.get("answer")), number(side.get("probability"))
    share = share if share is not None and 0 <= share <= 1 else None
    right = text == expected if share is not None and expected and text else None
    return {"text": text, "share": share, "right": right}


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
