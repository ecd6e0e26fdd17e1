"""A site's own training loss: what its engine computes, in one private file and nowhere else."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedtune.core.vault.prepared
import fedtune.core.vault.worker
from fedtune.core.config import Study, load_site, load_study
from fedtune.core.config.state_files import LOSSES
from fedtune.core.errors import InfrastructureError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.run_folder import load_plan
from fedtune.core.training.round_loss import RoundLoss
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.core.vault import own_loss
from fedtune.observe.metrics import LedgerFigures, Metrics
from fedtune.officer.purge import listing, purge
from tests.guarantee.search import Finder
from tests.guarantee.test_wire_inventory import shape
from tests.guarantee.world import NAMES, lay_out, patients, run

Means = list[float]


def lines_of(folder: Path, name: str = "north") -> list[str]:
    return (folder / f"state-{name}" / LOSSES).read_text().splitlines()


def lines(folder: Path, name: str = "north") -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(folder, name)]


@pytest.fixture
def means(monkeypatch: pytest.MonkeyPatch) -> Means:
    """Every mean that a site kept, whole."""
    found, honest = Means(), own_loss.line

    def line(study: Study, round_: int, mean: float | None) -> str:
        if mean is not None:
            found.append(mean)
        return honest(study, round_, mean)

    monkeypatch.setattr(own_loss, "line", line)
    return found


def test_it_is_the_mean_of_the_losses_that_gradients_are_of(
    tmp_path: Path, tiny_base: Path, means: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again, without gradients, from the adapter that the round began with."""
    expected, honest = list[float](), fedtune.core.vault.worker.local_round

    @torch.no_grad()
    def again(study: Study, data: CachedDataset, plan: Any, log: Any, round_: int, adapter: Any,
              *rest: Any) -> Any:  # fmt: skip
        data.network.load_trainable(adapter)
        batches = data.batches(range(len(data.dataset.examples)))
        losses = [study.objective.resolved.losses(data.network, batch) for batch in batches]
        expected.append(float(torch.cat(losses).mean()))
        with torch.enable_grad():
            return honest(study, data, plan, log, round_, adapter, *rest)

    monkeypatch.setattr(fedtune.core.vault.worker, "local_round", again)
    study = lay_out(tmp_path, tiny_base, patients(12))
    study.write_text(study.read_text().replace("sampling_rate = 0.5", "sampling_rate = 1.0"))
    run(study)
    assert means == pytest.approx(expected, rel=1e-5) and len(means) == 6
    kept = [row["loss"] for name in NAMES for row in lines(tmp_path, name)]
    assert sorted(kept) == pytest.approx(sorted(means), rel=1e-5)
    digest, path = load_plan(tmp_path / "run").digest, tmp_path / "state-north" / LOSSES
    assert [(row["plan"], row["round"]) for row in lines(tmp_path)] == [
        (digest, number) for number in (1, 2, 3)
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_gradient_follows_from_whether_it_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    from fedtune.core.models.build import build
    from fedtune.core.models.random_records import random_records

    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    network = build(study)
    network.draw_factor(1)
    data = CachedDataset(network, random_records(network, study))
    objective, seen = study.objective.resolved, RoundLoss()
    engines = [UnitGradientEngine(data, objective, losses=losses) for losses in (None, seen)]
    without, with_it = (engine.matrix(range(data.dataset.n_units)) for engine in engines)
    assert torch.equal(without, with_it) and seen.mean is not None and without.abs().sum() > 0


# ----------------------------------------------------------------------------- where it is not


def says_it_on_the_wire(patch: pytest.MonkeyPatch, means: Means) -> None:
    honest = fedtune.core.vault.prepared.step_summary
    patch.setattr(
        fedtune.core.vault.worker,
        "step_summary",
        lambda s: [e | {"loss": means[-1]} for e in honest(s)],
    )
    patch.setattr("fedtune.server.admission._events", json.loads)  # and a server that takes it


def logs_it(patch: pytest.MonkeyPatch, means: Means) -> None:
    honest = RoundLoss.add

    def add(self: RoundLoss, losses: torch.Tensor) -> None:
        honest(self, losses)
        logging.getLogger("fedtune.site").warning("mean loss %s", self.mean)

    patch.setattr(RoundLoss, "add", add)


def exports_it(patch: pytest.MonkeyPatch, means: Means) -> None:
    honest = LedgerFigures._figures
    patch.setattr(
        LedgerFigures, "_figures", lambda self: honest(self) | {"loss": ("Mean", means[-1])}
    )


LEAKS = (None, says_it_on_the_wire, logs_it, exports_it)


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: getattr(leak, "__name__", "none"))
def test_it_is_in_nothing_that_leaves(
    leak: Callable[[pytest.MonkeyPatch, Means], None] | None,
    tmp_path: Path,
    tiny_base: Path,
    means: Means,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Messages, the run, a site's other files, its log, its screen, its metrics. The twins say it
    in one of them."""
    from prometheus_client import generate_latest

    if leak:
        leak(monkeypatch, means)
    grid = run(lay_out(tmp_path, tiny_base, patients(12)))
    found = Metrics("site", site=tmp_path / "site-north.toml")
    metrics = generate_latest(found.registry)
    needles = [
        (form, needle)
        for mean in means
        for form, needle in (
            ("text", f"{mean:.9f}"[:8].encode()), ("exponent", f"{mean:.5e}".encode()),
            ("float64", struct.pack("<d", mean)), ("FLOAT64", struct.pack(">d", mean)),
        )
    ]  # fmt: skip
    finder, own = Finder(needles), [tmp_path / f"state-{name}" / LOSSES for name in NAMES]
    assert all(finder.found(path.read_bytes()) for path in own) and len(means) == 6
    places = {
        "wire": [hit for body in grid.sent for hit in finder.found(body)],
        "files": list(finder.in_folder(tmp_path, but=own)),
        "screen and log": finder.found(("".join(capfd.readouterr()) + caplog.text).encode()),
        "metrics": finder.found(metrics),
    }
    told = {name for name, hits in places.items() if hits}
    expected = {says_it_on_the_wire: {"wire", "files"}, logs_it: {"screen and log"}}
    assert told == (expected.get(leak, {"metrics"}) if leak else set())


@pytest.mark.parametrize("trouble", ["a folder in its place", "a link", "a pipe", "NaN", "nobody"])
def test_whatever_becomes_of_the_file_the_wire_is_the_same(
    trouble: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = run(lay_out(tmp_path / "usual", tiny_base, patients(12)))
    study = lay_out(tmp_path / "other", tiny_base, [] if trouble == "nobody" else patients(12))
    state = tmp_path / "other" / "state-north"
    state.mkdir(mode=0o700)
    if trouble == "a folder in its place":
        (state / LOSSES).mkdir()
    elif trouble == "a link":
        (state / LOSSES).symlink_to(tmp_path / "elsewhere")
    elif trouble == "a pipe":  # waited for, it would stop the round
        os.mkfifo(state / LOSSES)
    elif trouble == "NaN":
        honest = CausalLM().losses
        monkeypatch.setattr(CausalLM, "losses", staticmethod(lambda n, b: honest(n, b) * torch.nan))
        monkeypatch.setattr(fedtune.core.vault.worker, "check_learns", lambda *_: None)
    try:
        seen = shape(run(study))
    except InfrastructureError as error:
        raise AssertionError(f"the round failed: {error}") from None
    assert seen == shape(usual)
    assert not (tmp_path / "elsewhere").exists()
    sizes = {len(line) for line in lines_of(tmp_path / "usual")}
    assert len(sizes) == 1
    if trouble in ("NaN", "nobody"):
        assert [row["loss"] for row in lines(tmp_path / "other")] == [None] * 3
        assert {len(line) for line in lines_of(tmp_path / "other")} == sizes


@pytest.mark.parametrize("mean", [None, 0.0, 5.25, -3.5e-7, 1.8e308, float("nan"), float("inf")])
def test_every_line_has_the_same_length(
    mean: float | None, tiny_base: Path, tmp_path: Path
) -> None:
    study = load_study(lay_out(tmp_path, tiny_base, []))
    text = own_loss.line(study, 7, mean)
    assert len(text) == len(own_loss.line(study, 7, None)) and text.endswith("}")
    row = json.loads(text)
    known = mean is not None and abs(mean) < float("inf")
    assert row["round"] == 7 and row["loss"] == (pytest.approx(mean, rel=1e-5) if known else None)


def test_what_a_disk_takes_in_parts_tears_no_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does what a full disk left of an earlier line: the next one begins where it began."""
    study = load_study(lay_out(tmp_path, tiny_base, []))
    site, write = load_site(tmp_path / "site-north.toml"), os.write
    monkeypatch.setattr(os, "write", lambda to, content: write(to, bytes(content)[:20]))
    for round_ in (1, 2):
        with own_loss.kept(site, study, round_):
            pass
        with (site.site.state / LOSSES).open("a") as file:
            file.write('{"plan": "sha2')
    with own_loss.kept(site, study, 3):
        pass
    assert [row["round"] for row in lines(tmp_path)] == [1, 2, 3]


def test_purge_deletes_it(tmp_path: Path, tiny_base: Path) -> None:
    run(lay_out(tmp_path, tiny_base, patients(12)))
    site = load_site(tmp_path / "site-north.toml")
    contents = listing(site)
    assert contents.deletable["training losses by round"] == [site.site.state / LOSSES]
    purge(contents)
    assert not (site.site.state / LOSSES).exists()
