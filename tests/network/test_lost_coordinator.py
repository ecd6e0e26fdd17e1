"""The coordinator's machine is lost in the middle of a study, and restored from a backup that is a
round old: the sites go on with it, and nobody has paid too little."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.network.kit import OFF, PRIVATE, SITES, Consortium, consortium, done, end, until
from tests.network.test_kills import same_adapter, undisturbed

ROUNDS = 3


def lose(made: Consortium, backup: Path) -> None:
    """The machine is gone; another one, with the same name, is made from the backup."""
    shutil.rmtree(made.hub)
    done(made.root, "restore", backup, "--to", made.hub)
    (made.hub / "runs" / "run").rename(made.run)  # where the kit's server looks for it


@pytest.mark.long
@pytest.mark.parametrize("privacy", [OFF, PRIVATE], ids=["off", "private"])
def test_a_lost_coordinator_is_restored_in_mid_study(
    tmp_path: Path, tiny_base: Path, privacy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    backup = tmp_path / "backup"
    with consortium(tmp_path / "lost", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, privacy, ROUNDS, round_timeout=60)
        server = made.server()
        until(made.listens, 200, made.told)
        for name in SITES:
            made.join(name)
            made.client(name)
        until(lambda: made.rounds() >= 1, 400, made.told)
        study = made.hub / "study.toml"
        done(made.hub, "backup", study, "--out", made.run, "--to", backup)  # while it runs
        until(lambda: made.rounds() >= 2, 400, made.told)
        server.send_signal(signal.SIGKILL)
        server.wait()
        ahead = {name: len(made.spending(name)) for name in SITES}
        lose(made, backup)
        before = made.rounds()
        assert before < ROUNDS - 1  # the backup is older than what the sites have done
        assert made.server("--resume").wait(600) == 0, made.told()
        for process in made.running:
            end(process)
        took_part = [entry["participants"] for entry in made.report()["rounds"]]
        assert took_part == ROUNDS * [list(SITES)]
        for name in SITES:
            spent = made.spending(name)
            assert len(spent) >= ahead[name]
            paid: Counter[int] = Counter()
            for each in spent:
                paid[each.charge.round] += each.charge.steps
            if privacy == PRIVATE:
                assert not made.noised(name) - paid, f"under-charged: {name}"
                assert set(paid) == set(range(1, ROUNDS + 1))
        if privacy == OFF:
            same_adapter(made, undisturbed(tmp_path / "calm", tiny_base, ROUNDS))
