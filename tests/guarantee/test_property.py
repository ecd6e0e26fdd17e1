"""The guarantee, held to the site's own worker: found cases, whatever is drawn, and what leaks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

import fedtune.client.prepared
import fedtune.client.site
from fedtune.audit import selftest
from fedtune.client import secure_round
from fedtune.client.site import SiteWorker
from fedtune.config import Study
from fedtune.data.dataset import Dataset
from fedtune.dp.plan import DpPlan
from fedtune.models import lora
from fedtune.secagg import masks
from fedtune.secagg.draw import Draws
from fedtune.secagg.statement import Ready
from fedtune.training.round_loss import RoundLoss
from tests.guarantee import property_pins as pins
from tests.guarantee.property_cases import STORIES, cases
from tests.guarantee.property_files import bases_of
from tests.guarantee.property_plans import Case
from tests.guarantee.property_scan import SCANNED
from tests.guarantee.property_world import check

EXAMPLES = 10  # of each story in the short form; FEDTUNE_PROPERTY_EXAMPLES in the long one
PROFILE: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="session")
def bases(
    tiny_base: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return bases_of(tmp_path_factory.mktemp("property"), tiny_base, tiny_encoder)


@pytest.mark.parametrize("name", [*pins.PINNED, *SCANNED])
def test_a_case_that_broke_the_guarantee_once(name: str, bases: dict[str, Path]) -> None:
    check((pins.PINNED | SCANNED)[name], bases)


@pytest.mark.parametrize("largest", [lora.LARGEST, float("inf")])
def test_rows_that_are_computed_beside_others_do_not_know_them(
    largest: float, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the bound on an adapter's values, and by the shapes alone."""
    monkeypatch.setattr(lora, "LARGEST", largest)
    case = pins.teetering(bases, 1e10)
    if case is None:
        pytest.skip("on this machine no kernel of this size depends on the number of rows")
    check(case, bases)


@pytest.mark.parametrize("story", STORIES)
def test_whatever_the_records_and_whoever_the_unit(
    story: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "require", lambda *_: None)  # it sees no record; seconds a kind

    @settings(max_examples=EXAMPLES, derandomize=True, phases=[Phase.generate], **PROFILE)
    @given(cases(story=story))
    def holds(case: Case) -> None:
        check(case, bases)

    holds()


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"q": 0.5, "steps": 2}, {"drawn": "record", "cap": 3}])
def test_a_site_of_two_processes(changes: dict[str, Any], bases: dict[str, Path]) -> None:
    """A file that grows, and somebody who withdraws."""
    (plan,) = pins.GROWING.plans
    check(replace(pins.GROWING, plans=(replace(plan, **changes),), processes=2), bases)


@pytest.mark.long
@pytest.mark.parametrize("story", STORIES)
def test_at_length(story: str, bases: dict[str, Path]) -> None:
    """Another draw each time; what fails is shown as small as it can be made."""
    many = int(os.environ.get("FEDTUNE_PROPERTY_EXAMPLES", "400"))

    @settings(max_examples=many, print_blob=True, verbosity=Verbosity.normal, **PROFILE)
    @given(cases(story=story))
    def holds(case: Case) -> None:
        check(case, bases)

    holds()


# ------------------------------------------------------------------- twins: workers that leak


def by_the_true_count(patch: pytest.MonkeyPatch) -> None:
    """Divides by how many there are, not by how many were declared."""
    honest = DpPlan.step

    def step(plan: DpPlan, n: int, *rest: Any) -> torch.Tensor:
        return honest(plan, n, *rest) * plan.divisor / n

    patch.setattr(DpPlan, "step", step)


def says_how_many(patch: pytest.MonkeyPatch) -> None:
    """Names a count among what it ran."""
    honest, seen = fedtune.client.prepared.step_summary, list[int]()

    def read(self: SiteWorker, study: Study, *rest: Any) -> Dataset:
        dataset: Dataset = honest_read(self, study, *rest)
        seen.append(dataset.n_units)
        return dataset

    honest_read = SiteWorker._read
    patch.setattr(SiteWorker, "_read", read)
    patch.setattr(
        fedtune.client.site, "step_summary", lambda s: [e | {"units": seen[-1]} for e in honest(s)]
    )


def says_its_loss(patch: pytest.MonkeyPatch) -> None:
    """Names the loss that it keeps for itself among what it ran."""
    honest, kept = fedtune.client.prepared.step_summary, list[Any]()
    mean = RoundLoss.mean.fget
    assert mean
    patch.setattr(RoundLoss, "mean", property(lambda self: kept.append(mean(self)) or kept[-1]))
    patch.setattr(
        fedtune.client.site, "step_summary", lambda s: [e | {"loss": kept[-1]} for e in honest(s)]
    )


def drops_one_more(patch: pytest.MonkeyPatch) -> None:
    """Where there are an odd number of units, the last one is left out."""
    honest = SiteWorker._read

    def read(self: SiteWorker, study: Study, *rest: Any) -> Dataset:
        dataset: Dataset = honest(self, study, *rest)
        last = dataset.keys[-1] if dataset.n_units % 2 else None
        return dataset.exclude_units(lambda key: key == last)

    patch.setattr(SiteWorker, "_read", read)


def gives_up(patch: pytest.MonkeyPatch) -> None:
    """Ends with an error where fewer than seven are there."""
    honest = SiteWorker._read

    def read(self: SiteWorker, study: Study, *rest: Any) -> Dataset:
        dataset: Dataset = honest(self, study, *rest)
        if dataset.n_units < 7:
            raise RuntimeError("too few")
        return dataset

    patch.setattr(SiteWorker, "_read", read)


def clips_at_twice(patch: pytest.MonkeyPatch) -> None:
    honest = DpPlan.clipped_sum
    patch.setattr(DpPlan, "clipped_sum", lambda *a: 2 * honest(*a))


def clamps(patch: pytest.MonkeyPatch) -> None:
    """Masks its own noised sum within a range that most are in: an answer about that sum."""
    honest = masks.mask

    def mask(total: Any, *rest: Any) -> Any:
        return honest(np.clip(total, -(2**17), 2**17), *rest)

    patch.setattr(masks, "mask", mask)


def masks_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masks, "mask", lambda total, *_: total.astype("<u4"))


def says_its_true_size(patch: pytest.MonkeyPatch) -> None:
    """In its statement; the coordinator fixes the width of a word by it."""
    honest, seen = secure_round.local_sum, [0]

    def local_sum(study: Study, data: Any, *rest: Any) -> Any:
        seen.append(data.dataset.n_units)
        return honest(study, data, *rest)

    patch.setattr(secure_round, "local_sum", local_sum)
    patch.setattr(
        secure_round, "Ready", lambda draw, name, _, *rest: Ready(draw, name, seen[-1], *rest)
    )


def says_how_long_its_sum_is(patch: pytest.MonkeyPatch) -> None:
    """Of its noised sum, which is no secret where a site adds all the noise itself; here it is."""
    honest = Draws.keep

    def keep(draws: Draws, waiting: Any) -> None:
        norm = {"norm": float(np.linalg.norm(waiting.total))}
        honest(draws, replace(waiting, events=json.dumps([*json.loads(waiting.events), norm])))

    patch.setattr(Draws, "keep", keep)


SHARING = {
    clamps: "another sum is opened",
    masks_nothing: "not masked",
    says_its_true_size: "on the wire",
    says_how_long_its_sum_is: "on the wire",
    clips_at_twice: "the sum moved",
}
LEAKS = {
    by_the_true_count: "on the wire",
    says_how_many: "on the wire",
    says_its_loss: "on the wire",
    drops_one_more: "the sum moved",
    gives_up: "on the wire",
    clips_at_twice: "the sum moved",
}


@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_a_worker_that_leaks_is_caught(
    leak: Callable[[pytest.MonkeyPatch], None],
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(pins.ORDINARY, bases)
    leak(monkeypatch)
    with pytest.raises(AssertionError, match=LEAKS[leak]):
        check(pins.ORDINARY, bases)


@pytest.mark.parametrize("leak", SHARING, ids=lambda leak: leak.__name__)
def test_a_worker_that_shares_noise_and_leaks_is_caught(
    leak: Callable[[pytest.MonkeyPatch], None],
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(pins.SHARED, bases)
    leak(monkeypatch)
    with pytest.raises(AssertionError, match=SHARING[leak]):
        check(pins.SHARED, bases)
