"""Rounds are read as they come, and again where the file was written anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedtune.observe.rounds import FEW, NEWEST, Rounds


def line(number: int, **more: Any) -> str:
    entry = {"round": number, "seconds": 2.0, "epsilon": {"north": number / 2, "south": 1.0}}
    return json.dumps(entry | {"participants": ["north", "south"]} | more) + "\n"


def test_what_is_added_is_read_on(tmp_path: Path) -> None:
    file, rounds = tmp_path / "metrics.jsonl", Rounds(tmp_path)
    assert not rounds.refresh() and len(rounds) == 0
    file.write_text(line(1, quality={"loss": 2.0}))
    assert rounds.refresh() and not rounds.refresh()
    file.write_text(line(1, quality={"loss": 2.0}) + line(2) + line(3)[:20])
    assert rounds.refresh()
    assert list(rounds.number) == [1, 2] and list(rounds.epsilon["north"]) == [0.5, 1.0]
    assert rounds.quality["loss"][0] == 2.0 and math.isnan(rounds.quality["loss"][1])
    file.write_text(line(1, quality={"loss": 2.0}) + line(2) + line(3))
    assert rounds.refresh() and list(rounds.number) == [1, 2, 3]


def test_what_was_written_anew_is_read_again(tmp_path: Path) -> None:
    """After a crash the newest rounds may be others, or fewer."""
    file, rounds = tmp_path / "metrics.jsonl", Rounds(tmp_path)
    file.write_text(line(1) + line(2))
    rounds.refresh()
    file.write_text(line(1) + line(2, seconds=3.0))
    assert rounds.refresh() and list(rounds.seconds) == [2.0, 3.0]
    file.write_text(line(1))
    assert rounds.refresh() and list(rounds.number) == [1]


def test_a_line_that_is_none_is_left_out(tmp_path: Path) -> None:
    bad = ["{\n", "[]\n", '{"round": -1}\n', "\xff\n"]
    bad += ['{"round": 2, "epsilon": {"north": "much"}}\n']
    (tmp_path / "metrics.jsonl").write_text(line(1) + "".join(bad) + line(3))
    rounds = Rounds(tmp_path)
    assert rounds.refresh() and list(rounds.number) == [1, 3]
    columns = (rounds.seconds, rounds.largest, rounds.smallest, *rounds.epsilon.values())
    assert {len(column) for column in columns} == {2}


def test_of_many_sites_the_largest_and_smallest_are_kept(tmp_path: Path) -> None:
    many = {f"site-{n}": 1 + n / 100 for n in range(FEW + 1)}
    text = "".join(line(n, epsilon=many) for n in range(1, NEWEST + 11))
    (tmp_path / "metrics.jsonl").write_text(text)
    rounds = Rounds(tmp_path)
    rounds.refresh()
    assert not rounds.epsilon and len(rounds) == NEWEST + 10 and len(rounds.newest) == NEWEST
    assert (rounds.largest[-1], rounds.smallest[-1]) == (1 + FEW / 100, 1.0)
