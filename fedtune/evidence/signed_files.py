"""Read a signed JSON file of a run or a dossier, and say what is wrong with it.

Nothing is computed here, so that commands which only show what a folder says start quickly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from fedtune.core.errors import NotGenuine
from fedtune.core.files import reading
from fedtune.core.wire.keys import canonical

# The errors that a file's content may raise where it is read, if it has the wrong shape.
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
TODO = "get the folder again from who signed it; do not use this one"


def fail(where: Path | str, happened: str, expected: str = "") -> NoReturn:
    raise NotGenuine(f"{where}: {happened}", expected, TODO)


def signed_json(path: Path, form: str, most: int = reading.SMALL) -> tuple[dict[str, Any], bytes]:
    """Read a signed JSON file. Return two things: its content, and its bytes. The signature is not
    verified here.

    - path: the file
    - form: the value that the file must have under "format"
    - most: the largest size in bytes

    Errors: NotGenuine if the file is not canonical JSON of this format."""
    data = reading.content(path, "the file as it was signed", TODO, NotGenuine, most)
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or canonical(content) != data:
            raise ValueError
    except MALFORMED:
        fail(path, "was changed after it was signed", "canonical JSON")
    if content.get("format") != form:
        fail(path, "is of another format", form)
    return content, data
