"""`fedtune server` and `fedtune client --watch` as processes: by the clock, through a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.data.records import unit_member
from fedtune.core.ledger.ledger import Ledger
from fedtune.flower.ports import free_port
from fedtune.server.versions import Versions
from tests.continuous.world import study_text, write
from tests.guarantee.world import patients
from tests.network.kit import SITES, Consortium, consortium, until

SITE = """
[site]
name = "{name}"
declared_size = 20
[data]
path = "data.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
[policy]
bases = "any"
"""
SCHEDULE = """
[evaluation]
path = "public.jsonl"
columns = { prompt = "q", completion = "a" }
[schedule]
every = "4s"
"""


def lay_out(made: Consortium, base: Path) -> None:
    (made.hub / "study.toml").write_text(study_text(base, schedule=SCHEDULE))
    write(made.hub / "public.jsonl", [{"q": r["q"], "a": r["a"]} for r in patients(8)])
    for name in SITES:
        (made.root / name / "site.toml").write_text(SITE.format(name=name))
        write(made.root / name / "data.jsonl", patients(12))


def history(made: Consortium) -> list[dict[str, Any]]:
    path = made.run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long
def test_rounds_go_on_by_the_clock_through_a_kill_and_an_arrival(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        lay_out(made, tiny_base)
        hub = made.server("--resume")  # the first time too
        until(made.listens, 60, made.told)
        for name in SITES:
            made.join(name)
            made.client(name, *([] if name == "south" else ["--watch"]))
        until(lambda: made.rounds() >= 2, 150, made.told)
        hub.kill()
        hub.wait()
        write(made.root / "north" / "data.jsonl", patients(14))
        made.server("--resume")
        before = made.rounds()
        until(lambda: made.rounds() >= before + 2, 200, made.told)
        kept = history(made)
        slots = [entry["slot"] for entry in kept]
        assert slots == sorted(set(slots)), slots
        assert all(entry["participants"] == ["east", "north"] for entry in kept)
        assert all("--watch" in entry["missing"]["south"] for entry in kept)
        book = Ledger(made.root / "north" / "state")
        late = book.arrival("records")(unit_member("patient-13"))
        first, *_, last = book.cohorts("records")
        assert (first.units, last.units, last.arrival) == (12, 2, late)
        assert len(last.charges) == len(first.charges) - before
        index = Versions(made.run).index()
        assert index is not None and index.judged >= before + 1
        assert os.readlink(made.run / "adapter") == f"versions/{index.champion}"
        status = json.loads((made.run / "status.json").read_text())
        assert status["next"].endswith("Z") and status["champion"] == index.champion
