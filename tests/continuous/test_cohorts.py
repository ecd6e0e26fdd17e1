"""Who arrives late pays from then on, never less; who has spent everything is out, unseen."""

from __future__ import annotations

from pathlib import Path

from fedtune.dp.ledger import Ledger
from tests.continuous.world import lay_out, run, write
from tests.guarantee.world import patients


def test_it_runs(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))

    def later(number: int) -> None:
        if number == 2:
            write(tmp_path / "north.jsonl", patients(16))

    run(study, 6, later)
    for name in ("north", "south"):
        for c in Ledger(tmp_path / f"state-{name}").cohorts("records"):
            print(name, c.arrival, c.units, len(c.spent))
    print((tmp_path / "run" / "versions" / "index.json").read_text())
    print((tmp_path / "run" / "report.md").read_text()[:1500])
    raise AssertionError
