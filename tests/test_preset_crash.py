"""A client that dies in mid-round, under a preset's own numbers: its round is paid for twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.config import load_study
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault import worker as client_site
from fedtune.launch.simulate import simulate
from fedtune.officer.site_files import load_sites
from fedtune.presets import write
from fedtune.presets._sites import EPSILON
from tests.test_preset_tasks import records


def crash(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def laid_out(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of the task `answer`, whose first site died after its round was entered."""
    monkeypatch.chdir(tmp_path)
    paths = write(tmp_path / "own", "answer", records("answer", tmp_path, base=str(tiny_base)))
    return paths[0]


def killed(study: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(client_site, "local_round", crash)
        simulate(load_study(study), load_sites(study.parent / "sites"), out)


def resumed(study: Path, out: Path) -> tuple[set[str], dict[str, int], float]:
    """Who took part in the round, how often each site paid for it, and ε."""
    sites = load_sites(study.parent / "sites")
    report = simulate(load_study(study), sites, out, resume=True).report
    paid = {s.site.name: len(Ledger(s.site.state).charges(s.data.name)) for s in sites}
    return {*report["rounds"][0]["participants"]}, paid, report["privacy"]["epsilon"]


def test_no_site_is_lost(laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(laid_out, tmp_path / "run", monkeypatch)
    took_part, paid, epsilon = resumed(laid_out, tmp_path / "run")
    assert took_part == {*paid} and sorted(paid.values()) == [1, 2]
    assert epsilon <= EPSILON


def test_twin_at_the_ceiling_a_site_is_lost(
    laid_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = load_sites(laid_out.parent / "sites")[0].policy.max_epsilon
    text = laid_out.read_text()
    laid_out.write_text(text.replace("\nepsilon = 4.9", f"\nepsilon = {most}"))
    assert load_study(laid_out).privacy.epsilon == most
    killed(laid_out, tmp_path / "run", monkeypatch)
    took_part, paid, _ = resumed(laid_out, tmp_path / "run")
    assert len(took_part) == 1 and [*paid.values()] == [1, 1]
