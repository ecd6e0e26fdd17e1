"""Read a run's rounds from metrics.jsonl into columns. Each refresh continues where the last one
ended.

    rounds = Rounds(run)
    rounds.refresh()          # True: there are new rounds
    rounds.quality["loss"]    # an array with one number for each round; NaN if it was not measured

The coordinator rewrites the file after each round. If the last line that was read is still at its
place, reading continues after this line; else the whole file is read again. The file of a study
with 10,000 rounds and 200 sites has 140 MB. So the lines are not kept in memory; only columns of
numbers and, for a table, the NEWEST rounds are.
Guarantee: the columns hold only the fields of a round that the log's allow-list (log.py) permits. A
line that cannot be parsed is left out, and a missing file counts as an empty one; the next refresh
tries again."""

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
FEW = 12  # of up to so many sites, each ε curve is kept; of more, only the largest and smallest ε
NEWEST = 100  # the newest rounds, of which all fields are kept
NAN = math.nan


class Rounds:
    """The rounds of the run in `folder` as columns, each with one number for each round. All
    columns are empty until the first `refresh`.

    - number, seconds: the columns of the rounds' numbers and durations
    - quality: name of a measure → its column, measured on the evaluation records
    - selection: the same, measured on the selection records
    - epsilon: site → the column of its ε; {} if the run has more than FEW sites
    - largest, smallest: the columns of the largest and the smallest ε of a site
    - newest: all fields of the newest rounds, at most NEWEST"""

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
        """Read the lines that were added or changed since the last call. Return whether there were
        any."""
        before = (self._at, self._last)
        with suppress(FedtuneError, OSError):
            reading.regular(self.path, "the metrics of a run")
            with self.path.open("rb") as file:
                file.seek(self._at - len(self._last))
                if file.read(len(self._last)) != self._last:  # earlier lines have changed
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
        """Add a round to the columns. Errors: TypeError, ValueError or KeyError if the entry is not
        a round's; then nothing is added."""
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
    """Append a round's figures to their columns. A column for which the round has no figure gets
    NaN. columns: name of a figure → its values by round. figures: the round's figures by name.
    count: the number of earlier rounds, for which a new column gets NaN."""
    for name in figures:
        columns.setdefault(name, array("d", [NAN]) * count)
    for name, column in columns.items():
        column.append(figures.get(name, NAN))


def _to_float(value: Any) -> float:
    return NAN if value is None else float(value)
