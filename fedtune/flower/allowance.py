"""Limit uploads: after each message to a site, the site may push REPEATS times the bytes that the
plan allows for its answer, and SLACK bytes more.

The coordinator writes home/flower/allowance.json, site -> [number of messages sent to the site,
bytes that the plan allows for its answer], before it sends a message. The gateway reads it.

| a new message to the site     | the count of the site's bytes starts at 0                      |
| why REPEATS                   | a broken connection makes a site send at most two parts again  |
| no message to the site yet, or the file cannot be read | it may push nothing                   |
| there is no file              | no limit: a test may use a SuperLink without a coordinator     |
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
    """Return site -> (number of messages sent to it, bytes that the plan allows for its newest
    answer); None if there is no file. Errors: OSError, ValueError or TypeError if the file cannot
    be read."""
    try:
        allowed = json.loads(_file(home).read_bytes())
    except FileNotFoundError:
        return None
    return {str(name): (int(count), int(most)) for name, (count, most) in allowed.items()}


def compute_limit(answer: int) -> int:
    """Return the total number of bytes that a site may push for an answer of `answer` bytes."""
    return REPEATS * answer + SLACK


def _file(home: Path) -> Path:
    return home / "flower" / "allowance.json"


class Quota:
    """Counts the requests and bytes of each site at the gateway that serves `home`, and says
    whether they are within the site's limits.

    A site may send `burst` requests at once, and `rate` a second in the long run (a token bucket).
    The bytes that it may push are limited by its allowance in home/flower/allowance.json."""

    def __init__(self, home: Path, burst: int, rate: float) -> None:
        self._home = home
        self._burst = burst
        self._rate = rate
        self.tokens: dict[str, tuple[float, float]] = {}  # site -> its tokens, at this time
        self._pushed: dict[str, tuple[int, int]] = {}  # site -> number of the message, bytes since

    def request(self, name: str) -> bool:
        """Count a request of site `name`. Return whether it is within the rate."""
        tokens, then = self.tokens.get(name, (float(self._burst), 0.0))
        now = time.monotonic()
        tokens = min(self._burst, tokens + (now - then) * self._rate) - 1
        self.tokens[name] = (max(tokens, 0.0), now)
        return tokens >= 0

    def push(self, name: str, size: int) -> bool:
        """Count `size` bytes that site `name` pushes. Return whether the total since the newest
        message to the site is within its allowance; if it is not, the bytes are not counted."""
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
