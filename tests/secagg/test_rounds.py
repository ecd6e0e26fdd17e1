"""Rounds whose sum alone is opened: the same adapter as without masks, resumed, paid, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune
from fedtune.core.dp.shared_noise import grid_of
from fedtune.core.errors import FedtuneError, PolicyRefused, Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import secure_round
from fedtune.core.vault.worker import SiteWorker
from tests.secagg.world import adapter_of, lay_out

BYTES = 64 * 1024  # of a site and round, beside its words


@pytest.fixture(autouse=True)
def fresh() -> None:
    process_cache.clear("workers")


def trained(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays) if "lora_B" in name])


def charges(folder: Path, name: str) -> list[Any]:
    return Ledger(folder / f"{name}-state").charges("records")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_without_noise_the_masked_sum_moves_the_adapter_as_the_mean_does(
    tmp_path: Path, tiny_base: Path, processes: int
) -> None:
    """To the grid: each site's rows are rounded to it, and nothing else differs."""
    study, sites = lay_out(tmp_path / "masked", tiny_base)
    masked = fedtune.simulate(study, sites, tmp_path / "one", processes=processes)
    plain = fedtune.simulate(
        *lay_out(tmp_path / "plain", tiny_base, secure=False), tmp_path / "two"
    )
    one, two = trained(adapter_of(masked)), trained(adapter_of(plain))
    rows, learning_rate, rounds = 16, study.training.learning_rate, 2
    step = grid_of(study, None, len(one)) * rows / 2 * learning_rate / 20 * rounds
    assert np.abs(one - two).max() <= 2 * step
    assert np.abs(one).max() > 20 * step  # it did learn
    assert masked.report["rounds"][1]["participants"] == ["north", "south", "west"]


def test_a_private_run_says_both_epsilons_and_verifies(tmp_path: Path, tiny_base: Path) -> None:
    run = fedtune.simulate(*lay_out(tmp_path, tiny_base, epsilon=3.0), tmp_path / "run")
    privacy = run.report["privacy"]
    assert 2.9 < privacy["epsilon"] <= 3.0
    assert privacy["secure_aggregation"]["fallback_epsilon"] == pytest.approx(4.625, abs=0.01)
    assert fedtune.verify_run(run.folder).epsilon == privacy["epsilon"]
    for name in ("north", "south", "west"):
        (first, second) = charges(tmp_path, name)
        assert (first.sites, first.colluding, first.round, second.round) == (3, 1, 1, 2)
        joint, alone = first.event.noise_multiplier, first.fallback.noise_multiplier
        assert joint == pytest.approx(alone * 2**0.5) and joint >= privacy["noise_multiplier"]


@pytest.mark.parametrize("field", ["fallback_epsilon", "own_noise_multiplier", "colluding"])
def test_a_report_that_understates_what_a_broken_aggregation_leaves_is_caught(
    tmp_path: Path, tiny_base: Path, field: str
) -> None:
    from fedtune.core.errors import NotGenuine
    from fedtune.core.wire.keys import SigningKey
    from fedtune.evidence.sign import sign_files

    run = fedtune.simulate(*lay_out(tmp_path, tiny_base, epsilon=3.0, rounds=1), tmp_path / "run")
    path = run.folder / "report.json"
    report = json.loads(path.read_text())
    report["privacy"]["sites"]["south"]["secure_aggregation"][field] = 2.0 if "_" in field else 0
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text)
    sign_files(run.folder, SigningKey())
    with pytest.raises(NotGenuine, match="south"):
        fedtune.verify_run(run.folder)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_coordinator_stopped_between_ready_and_sum_goes_on_with_the_draws_that_are_there(
    tmp_path: Path, tiny_base: Path, restarted: bool
) -> None:
    """σ = 0, so that a new draw gives the same sum. Sites that went on running draw nothing anew.
    Where all restart at each stop, what waited for its set is gone, and drawn and paid anew: the
    draws of who was asked before the first stop, and at the second those of who had not masked yet,
    which voids the attempt of all."""
    whole = fedtune.simulate(*lay_out(tmp_path / "whole", tiny_base), tmp_path / "one")
    study, sites = lay_out(tmp_path / "cut", tiny_base)
    for stop in ("ready", "masked", "masked"):

        def interrupt(kind: str, data: dict[str, Any], stop: str = stop) -> None:
            if kind == "site" and data["status"] == stop and data["name"] == "south":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fedtune.simulate(
                study, sites, tmp_path / "two", on_event=interrupt, resume=stop == "masked"
            )
        if restarted:
            process_cache.clear("workers")
    resumed = fedtune.simulate(study, sites, tmp_path / "two", resume=True)
    assert np.array_equal(trained(adapter_of(whole)), trained(adapter_of(resumed)))
    for name in ("north", "south", "west"):
        drawn = [charge.round for charge in charges(tmp_path / "cut", name)]
        assert drawn == [1] * drawn.count(1) + [2]
        assert 2 <= drawn.count(1) <= 3 if restarted else drawn.count(1) == 1


def test_a_missing_message_voids_the_attempt_and_the_next_is_a_new_paid_draw(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, failed = secure_round.mask_sum, list[int]()

    def masked(site: SiteWorker, digest: str, round_: int, attempt: int, *rest: Any) -> Any:
        if site.site.site.name == "south" and attempt == 1 and round_ == 1:
            failed.append(attempt)
            raise FedtuneError("the machine is busy")
        return honest(site, digest, round_, attempt, *rest)

    monkeypatch.setattr(secure_round, "mask_sum", masked)
    study, sites = lay_out(tmp_path, tiny_base, epsilon=3.0)
    run = fedtune.simulate(study, sites, tmp_path / "run")
    assert failed == [1, 1, 1, 1]
    for name in ("north", "south", "west"):
        first, again, second = charges(tmp_path, name)
        assert (first.round, again.round, second.round) == (1, 1, 2)
    assert run.report["privacy"]["epsilon"] > 3.0  # said, not hidden
    assert fedtune.verify_run(run.folder).epsilon == run.report["privacy"]["epsilon"]


def test_a_site_pins_its_peers_or_spends_nothing(tmp_path: Path, tiny_base: Path) -> None:
    study, sites = lay_out(tmp_path, tiny_base, epsilon=3.0)
    strangers = tuple(f"{n:064x}" for n in (1, 2))
    text = (tmp_path / "north.toml").read_text() + f"peers = {json.dumps(strangers)}\n"
    (tmp_path / "north.toml").write_text(text)
    sites[0] = fedtune.load_site(tmp_path / "north.toml")
    with pytest.raises(FedtuneError, match="pinned"):
        fedtune.simulate(study, sites, tmp_path / "run")
    assert not charges(tmp_path, "north")


def test_one_update_is_never_trained_for_a_plan_that_opens_sums(
    tmp_path: Path, tiny_base: Path
) -> None:
    study, sites = lay_out(tmp_path, tiny_base, epsilon=3.0, rounds=1)
    fedtune.simulate(study, sites, tmp_path / "run")
    from fedtune.core.vault.worker import worker

    site = worker(str(tmp_path / "north.toml"))
    digest = next(iter(site._prepared))
    with pytest.raises(PolicyRefused, match="sum of all sites"):
        site.train(digest, 1, {})


def test_the_ceiling_of_the_fallback_refuses(tmp_path: Path, tiny_base: Path) -> None:
    study, sites = lay_out(tmp_path, tiny_base, epsilon=3.0)
    strict = [site.changed(policy={"max_fallback_epsilon": 4.5}) for site in sites]
    with pytest.raises(Refused, match="max_fallback_epsilon"):
        fedtune.simulate(study, strict, tmp_path / "run")


def test_what_a_site_sends_is_four_bytes_a_number(tmp_path: Path, tiny_base: Path) -> None:
    study, sites = lay_out(tmp_path, tiny_base)
    run = fedtune.simulate(study, sites, tmp_path / "run")
    dimension = run.report["adapter"]["parameters"]
    for entry in run.report["rounds"]:
        assert max(entry["bytes_up"].values()) <= 4.2 * dimension + BYTES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"local_steps": 2}}, "local_steps"),
        ({"training": {"sampling_rate": None, "expected_batch": 4}}, "expected_batch"),
        ({"training": {"proximal_mu": 0.1}}, "proximal_mu"),
        ({"strategy": {"weights": "equal"}}, "weights"),
        ({"strategy": {"min_sites": 2}}, "colluding"),
        ({"secure_aggregation": {"colluding": 2}}, "colluding"),
        ({"lora": {"min_rank": 1}}, "min_rank"),
    ],
)
def test_what_cannot_go_with_it_is_refused_with_the_reason(
    tmp_path: Path, tiny_base: Path, changes: dict[str, Any], says: str
) -> None:
    study, _ = lay_out(tmp_path, tiny_base, epsilon=3.0)
    with pytest.raises(ValueError, match=says):
        study.changed(**changes)
