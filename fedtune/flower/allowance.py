"""Limit how much a site uploads. After each message to a site, the site may push REPEATS times the
bytes that the plan allows for the answer to this message, plus SLACK bytes. REPEATS is above 1,
since after a broken connection a site sends at most two parts again.

Before the coordinator sends a message, it writes home/flower/allowance.json, which the gateway
reads. This file holds, for each site, a list of two numbers: how many messages were sent to the
site, and how many bytes the plan allows for its answer to the newest one.

| if                              | then                                                         |
| a new message goes to the site  | the count of the site's bytes starts at 0                    |
| no message went to the site yet | the site may push nothing                                    |
| the file cannot be read         | the site may push nothing                                    |
| there is no file                | no limit: a test may use a SuperLink without a coordinator   |
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
    """Read the allowances of all sites. Return site -> (number of messages sent to it, bytes that
    the plan allows for its answer to the newest one); None if there is no file. home: the
    coordinator's home. Errors: OSError, ValueError or TypeError if the file cannot be read."""
    try:
        allowed = json.loads(_file(home).read_bytes())
    except FileNotFoundError:
        return None
    return {str(name): (int(count), int(most)) for name, (count, most) in allowed.items()}


def compute_limit(answer: int) -> int:
    """Return how many bytes a site may push in all for one answer, repetitions included. answer:
    the bytes that the plan allows for it."""
    return REPEATS * answer + SLACK


def _file(home: Path) -> Path:
    return home / "flower" / "allowance.json"


class Quota:
    """Counts the requests and bytes of each site at the gateway that serves `home`, and says
    whether they are within the site's limits.

    A site may send `burst` requests at once, and `rate` a second in the long run (a token bucket).
    How many bytes it may push follows from home/flower/allowance.json."""

    def __init__(self, home: Path, burst: int, rate: float) -> None:
        self._home = home
        self._burst = burst
        self._rate = rate
        # Site -> its tokens, and the time at which it had so many.
        self.tokens: dict[str, tuple[float, float]] = {}
        # Site -> the number of the newest message to it, and the bytes that it has pushed since.
        self._pushed: dict[str, tuple[int, int]] = {}

    def request(self, name: str) -> bool:
        """Count a request of site `name`. Return whether the request is within the site's rate."""
        tokens, then = self.tokens.get(name, (float(self._burst), 0.0))
        now = time.monotonic()
        tokens = min(self._burst, tokens + (now - then) * self._rate) - 1
        self.tokens[name] = (max(tokens, 0.0), now)
        return tokens >= 0

    def push(self, name: str, size: int) -> bool:
        """Count `size` bytes that site `name` wants to push. Return whether all bytes since the
        newest message to the site are within its limit. If they are not, the `size` bytes are not
        counted. Without an allowance file there is no limit."""
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
