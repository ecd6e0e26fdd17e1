"""Read a run's rounds from metrics.jsonl into columns, line by line, continuing from the last
position.

    rounds = Rounds(run)
    rounds.refresh()          # True: there are new ones
    rounds.quality["loss"]    # an array of one number a round; NaN where it was not measured

The coordinator writes the file anew after each round; earlier rounds are kept if their last line is
still at its place, else everything is read again. A study of 10,000 rounds and 200 sites has 140 MB
of it, so no line is kept: columns of numbers, and NEWEST rounds for a table.
Guarantee: what the log's allow-list (log.py) lets through of a round, and nothing else.
| a line that is none, or a file that is not there | left out; the next refresh looks again |
"""

from __future__ import annotations

import json
import math
from array import array
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError
from fedtune.core.files import reading
from fedtune.observe.log import FIELDS, LOGGABLE, Record

FILE = "metrics.jsonl"
FEW = 12  # sites that have a curve of ε of their own; of more, the largest and the smallest
NEWEST = 100  # rounds kept whole
NAN = math.nan


class Rounds:
    """The rounds of the run in `folder`; empty until the first `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._clear()

    def _clear(self) -> None:
        self.number, self.seconds = array("q"), array("d")
        self.quality: dict[str, array[float]] = {}
        self.selection: dict[str, array[float]] = {}
        self.epsilon: dict[str, array[float]] = {}
        self.largest, self.smallest = array("d"), array("d")
        self.newest: deque[Record] = deque(maxlen=NEWEST)
        self._at = 0
        self._last = b""
        self._many = False

    def __len__(self) -> int:
        return len(self.number)

    def refresh(self) -> bool:
        """Read what was added or changed since the last call; return whether there was any."""
        before = (self._at, self._last)
        with suppress(FedtuneError, OSError):
            reading.regular(self.path, "the metrics of a run")
            with self.path.open("rb") as file:
                file.seek(self._at - len(self._last))
                if file.read(len(self._last)) != self._last:  # written anew, and differently
                    self._clear()
                    file.seek(0)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._at, self._last = self._at + len(line), line
                    self._add(line)
        return (self._at, self._last) != before

    def _add(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._enter(json.loads(line))

    def _enter(self, entry: Record) -> None:
        """Enter a round. Errors: TypeError, ValueError, KeyError for values that no round has,
        before anything is entered."""
        round_, seconds = FIELDS["round"](entry["round"]), entry.get("seconds")
        spent = entry.get("epsilon") or {}
        values = [math.inf if value is None else float(value) for value in spent.values()]
        missing = FIELDS["missing"](entry.get("missing") or {})
        quality, selection = (_figures(entry.get(key) or {}) for key in ("quality", "selection"))
        up, down = (
            sum(map(int, (entry.get(k) or {}).values())) for k in ("bytes_up", "bytes_down")
        )
        sites, count = len(entry.get("participants") or ()), len(self)
        few = not self._many and len(spent.keys() | self.epsilon.keys()) <= FEW
        by_site = {FIELDS["site"](n): v for n, v in zip(spent, values, strict=True)} if few else {}
        self.number.append(round_)
        self.seconds.append(_to_float(seconds))
        self.largest.append(max(values, default=NAN))
        self.smallest.append(min(values, default=NAN))
        _extend(self.quality, quality, count)
        _extend(self.selection, selection, count)
        if few:
            _extend(self.epsilon, by_site, count)
        else:
            self._many = True
            self.epsilon.clear()
        row: Record = {"round": round_, "quality": quality, "selection": selection}
        row |= {"epsilon": max(values, default=None), "sites": sites, "missing": missing}
        self.newest.append(row | {"seconds": seconds, "bytes": up + down})


def _figures(values: Record) -> dict[str, float]:
    return {name: _to_float(value) for name, value in values.items() if name in LOGGABLE}


def _extend(columns: dict[str, array[float]], figures: dict[str, float], count: int) -> None:
    """Add a round's figures to their columns, each as long as all rounds."""
    for name in figures:
        columns.setdefault(name, array("d", [NAN]) * count)
    for name, column in columns.items():
        column.append(figures.get(name, NAN))


def _to_float(value: Any) -> float:
    return NAN if value is None else float(value)
