"""A site's audit log whose newest entries were cut off is found by what the site's updates say of
it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.errors import InputError
from fedtune.core.ledger.audit_log import FILE, verify
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from fedtune.officer.noted_in_run import noted_in
from fedtune.officer.site_files import sites_in
from tests.cli_kit import run
from tests.guarantee.world import lay_out, patients
from tests.guarantee.world import run as record
from tests.simulated import simulate


def lines(folder: Path) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path, tiny_base, patients(12))
    return tmp_path


def cut_off(state: Path, keep: int) -> None:
    (state / FILE).write_bytes(b"".join(lines(state)[:keep]))


def test_entries_that_were_cut_off_are_found_by_any_run_that_the_site_took_part_in(
    world: Path,
) -> None:
    simulate(world / "study.toml", sites_in(world), world / "run")
    site, state = world / "site-north.toml", world / "state-north"
    assert run("log", site, "--verify", "--run", world / "run").exit_code == 0
    cut_off(state, 2)
    assert run("log", site, "--verify").exit_code == 0, "nothing beside the log can tell"
    found = run("log", site, "--verify", "--run", world / "run")
    assert found.exit_code == 2 and "entry 3 is not the one" in found.stderr
    both = run("log", site, "--run", world / "run", "--head", "1:" + "0" * 64)
    assert both.exit_code == 2 and "one of the two" in both.stderr
    stranger = run("log", world / "state-south", "--verify", "--run", world / "run", "--json")
    assert stranger.exit_code == 0, "of its own updates alone"
    (state / "site.key").unlink()
    SigningKey.at(state / "site.key")
    with pytest.raises(InputError, match="no update in it is from this site"):
        noted_in(world / "run", state)


@pytest.mark.parametrize("keep", [6, 1, 0])
def test_a_log_that_was_cut_off_in_mid_study_says_so_and_the_study_goes_on(
    tmp_path: Path, tiny_base: Path, keep: int
) -> None:
    """keep = 6, the twin: nothing was cut."""
    state, rounds = tmp_path / "state-north", list[str]()

    def between(kind: str) -> None:
        rounds.extend([kind] if kind == "round" else [])
        if kind == "round" and len(rounds) == 2:  # three entries: admitted, two rounds released
            cut_off(state, keep)

    record(lay_out(tmp_path, tiny_base, patients(12)), between)
    signer = Ledger(state).key.public
    said = [(e["event"], e["facts"].get("entry")) for e in verify(state, signer).entries]
    cut = [("cut", 2)] if keep < 3 else []
    if keep == 0:  # then audit.lock tells it, too
        cut.insert(0, ("cut", 0))
    assert said[min(keep, 3) :] == [*cut, ("release", None)]
