"""Limit uploads: a site may push as much as it was last asked for, of which the server informs
the gateway.

home/flower/allowance.json: site -> [how often it was asked, bytes of the answer that the plan
implies]. It is written before a message goes out, so that it is there when the site answers.

| asked again             | it counts from zero                                              |
| parts that are repeated | REPEATS times the answer, and SLACK more: a cut costs two parts  |
| never asked             | nothing                                                          |
| no file                 | None: whoever started this SuperLink asks by itself, as tests do |
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from fedtune.core.files.writing import replace

REPEATS, SLACK = 3, 64 << 20
Asked = Mapping[str, tuple[int, int]]


def write(home: Path, asked: Asked) -> None:
    replace(_file(home), json.dumps(asked).encode(), private=True)


def read(home: Path) -> Asked | None:
    """Read the allowances. Errors: OSError, ValueError if the file cannot be read."""
    try:
        allowed = json.loads(_file(home).read_bytes())
    except FileNotFoundError:
        return None
    return {str(name): (int(count), int(most)) for name, (count, most) in allowed.items()}


def compute_limit(answer: int) -> int:
    """Return the total number of bytes that may be pushed for an answer of this size."""
    return REPEATS * answer + SLACK


def _file(home: Path) -> Path:
    return home / "flower" / "allowance.json"


class Quota:
    """Remaining quota of each site at the gateway that serves `home`: a token bucket for requests
    (`burst` at once, `rate` a second), and the bytes that the coordinator asked it for."""

    def __init__(self, home: Path, burst: int, rate: float) -> None:
        self._home = home
        self._burst = burst
        self._rate = rate
        self.tokens: dict[str, tuple[float, float]] = {}  # site -> what is left, and when
        self._pushed: dict[str, tuple[int, int]] = {}  # site -> which asking, bytes since

    def request(self, name: str) -> bool:
        """Count a request; False if it is one too many."""
        tokens, then = self.tokens.get(name, (float(self._burst), 0.0))
        now = time.monotonic()
        tokens = min(self._burst, tokens + (now - then) * self._rate) - 1
        self.tokens[name] = (max(tokens, 0.0), now)
        return tokens >= 0

    def push(self, name: str, size: int) -> bool:
        """Count what a site pushes against what it was asked for; False if it is more."""
        try:
            asked = read(self._home)
        except (OSError, ValueError, TypeError):
            asked = {}
        if asked is None:
            return True
        count, answer = asked.get(name, (0, 0))
        before, spent = self._pushed.get(name, (0, 0))
        spent = size + (spent if before == count else 0)
        if count == 0 or spent > compute_limit(answer):
            return False
        self._pushed[name] = (count, spent)
        return True
