"""How much each site may push, by what it was last asked for: the server tells the gateway.

home/flower/allowance.json: site -> [how often it was asked, bytes of the answer that the plan
implies]. Written before a message goes out, so that whoever answers finds it.

| asked again             | it counts from zero                                              |
| parts that are repeated | REPEATS times the answer, and SLACK more: a cut costs two parts  |
| never asked             | nothing                                                          |
| no file                 | None: whoever started this SuperLink asks by itself, as tests do |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedtune.files.writing import replace

REPEATS, SLACK = 3, 64 << 20
Asked = Mapping[str, tuple[int, int]]


def write(home: Path, asked: Asked) -> None:
    replace(_file(home), json.dumps(asked).encode(), private=True)


def read(home: Path) -> Asked | None:
    """Errors: OSError, ValueError where the file cannot be read."""
    try:
        said = json.loads(_file(home).read_bytes())
    except FileNotFoundError:
        return None
    return {str(name): (int(count), int(most)) for name, (count, most) in said.items()}


def most(answer: int) -> int:
    """Bytes that may be pushed, in all, for an answer of so many."""
    return REPEATS * answer + SLACK


def _file(home: Path) -> Path:
    return home / "flower" / "allowance.json"
