"""The guarantee, held to the site's own worker: found cases, whatever is drawn, and what leaks."""

from __future__ import annotations

import contextlib
import itertools
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

import fedtune.core.vault.prepared
import fedtune.core.vault.worker
from fedtune.core.config import Site, Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.dp import clip
from fedtune.core.dp.plan import DpPlan, SitePlan
from fedtune.core.errors import InfrastructureError
from fedtune.core.files.room import Room
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models import lora, prefix_store
from fedtune.core.models.prefix_store import PrefixStore
from fedtune.core.secagg import masks
from fedtune.core.secagg.draw import Draws
from fedtune.core.secagg.statement import Ready
from fedtune.core.training import selftest
from fedtune.core.training.round_loss import RoundLoss
from fedtune.core.vault import rank_process, secure_round, studies
from fedtune.core.vault.reading import OF_COUNTS
from fedtune.core.vault.worker import SiteWorker
from fedtune.officer import withdraw
from tests.depth import long_but, long_of
from tests.guarantee import property_pins as pins
from tests.guarantee.property_cases import STORIES, cases, pairs
from tests.guarantee.property_files import bases_of
from tests.guarantee.property_plans import SIZE, Case
from tests.guarantee.property_scan import SCANNED
from tests.guarantee.property_world import check, compare
from tests.secagg.test_twins import Stored

EXAMPLES = 2  # of each story in the short form; FEDTUNE_PROPERTY_EXAMPLES in the long one
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


SLOW = (  # a base of its own, processes, or a disk filled to each byte
    *(*SCANNED, "an-image-of-one-line", "class-statistics", "a-disk-full-of-members"),
    *("a-disk-full-of-the-ranks-states", "a-disk-full-of-states-asked-about", "ranks-read-later"),
    *("ranks-read-for-a-later-plan", "too-long-for-an-encoder", "a-folder-put-back-at-work"),
)


@pytest.mark.parametrize("name", long_of(SLOW, [*pins.PINNED, *SCANNED]))
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


@pytest.mark.parametrize("case", [pins.ORDINARY, pins.SHARED], ids=["alone", "shared noise"])
def test_memory_that_runs_out_where_rows_are_clipped(
    case: Case, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the rows of all the others at once, and not the unit's beside them; what was added
    by then stays in the sum that was begun. Twin: the others' rows are given up with it."""
    honest = clip.add_clipped

    def add_clipped(total: torch.Tensor, chunk: clip.Chunk, *rest: Any) -> None:
        honest(total, chunk, *rest)
        if len(chunk.rows) > 6:
            raise MemoryError

    monkeypatch.setattr(clip, "add_clipped", add_clipped)
    check(case, bases)
    monkeypatch.setattr(SitePlan, "_together_or_alone", gives_the_rows_up)
    with pytest.raises(AssertionError, match="the sum moved"):
        check(case, bases)


def gives_the_rows_up(_: Any, rows: list[int], dimension: int, clipped_sum: Any) -> torch.Tensor:
    try:
        return clipped_sum(rows)
    except MemoryError:
        return torch.zeros(dimension, dtype=torch.int64)


@pytest.mark.parametrize("broken", long_but([""], ["", "no room", "of one length"]))
def test_a_disk_without_room_for_members_or_an_update(
    broken: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one on which no round can be charged to one that takes both rounds. Twins: a ledger that
    remembers records at any price and keeps no room for its charges; a room that is as long beside
    a long ledger as beside a short one."""
    least = Room(Path(), SIZE).size
    sizes = [*range(5_000, 13_000, 2_000), *range(least - 1_536, least + 12_288 + OF_COUNTS, 1_280)]
    if broken == "no room":
        monkeypatch.setattr(SiteWorker, "_remember", remembers_at_any_price)
        monkeypatch.setattr(SiteWorker, "room_to_answer", lambda _: contextlib.nullcontext())
    elif broken:
        monkeypatch.setattr(Room, "_grown", 0)
    with contextlib.nullcontext() if not broken else pytest.raises(AssertionError, match="is seen"):
        for size in sizes:
            compare(pins.MEMBERS, bases, size)


def remembers_at_any_price(
    site: Any, study: Study, data: Any, dataset: Dataset
) -> frozenset[bytes]:
    about = data.name, data.disjoint_from, dataset.content_hash, dataset.members, data.cohort
    return frozenset(site.ledger.declare(*about))


@pytest.mark.parametrize("story", long_of(["continuous"], STORIES))
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
    """A file that grows, and somebody who withdraws; the team starts as `fedtune client` does."""
    (plan,) = pins.GROWING.plans
    changed = replace(plan, **changes)
    check(replace(pins.GROWING, plans=(changed,), processes=2, forked=False), bases)


@pytest.mark.long
@pytest.mark.parametrize("story", STORIES)
def test_at_length(story: str, bases: dict[str, Path]) -> None:
    """Another draw each time; what fails is shown as small as it can be made."""
    many = int(os.environ.get("FEDTUNE_PROPERTY_EXAMPLES", "400"))

    @settings(
        max_examples=many, derandomize=False, print_blob=True, verbosity=Verbosity.normal, **PROFILE
    )
    @given(cases(story=story))
    def holds(case: Case) -> None:
        check(case, bases)

    holds()


@pytest.mark.long
def test_every_two_values_of_the_axes(bases: dict[str, Path]) -> None:
    """Two cases of each: hypothesis draws the least that there is first."""
    for axes in pairs():

        @settings(max_examples=2, derandomize=True, phases=[Phase.generate], **PROFILE)
        @given(cases(**axes))
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
    honest, seen = fedtune.core.vault.prepared.step_summary, list[int]()

    def read(self: SiteWorker, study: Study, *rest: Any) -> Dataset:
        dataset: Dataset = honest_read(self, study, *rest)
        seen.append(dataset.n_units)
        return dataset

    honest_read = SiteWorker._read
    patch.setattr(SiteWorker, "_read", read)
    patch.setattr(
        fedtune.core.vault.worker,
        "step_summary",
        lambda s: [e | {"units": seen[-1]} for e in honest(s)],
    )


def says_its_loss(patch: pytest.MonkeyPatch) -> None:
    """Names the loss that it keeps for itself among what it ran."""
    honest, kept = fedtune.core.vault.prepared.step_summary, list[Any]()
    mean = RoundLoss.mean.fget
    assert mean
    patch.setattr(RoundLoss, "mean", property(lambda self: kept.append(mean(self)) or kept[-1]))
    patch.setattr(
        fedtune.core.vault.worker,
        "step_summary",
        lambda s: [e | {"loss": kept[-1]} for e in honest(s)],
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
    """Ends with an error where fewer than seven are there, so that one record moves all sent."""
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


def ranks_read_for_themselves(patch: pytest.MonkeyPatch) -> None:
    """Have each process of a team read the files when it is handed the records."""
    begin, take = rank_process._StudyAtRank.__init__, rank_process._StudyAtRank.take

    def begun(self: Any, site: Site, *rest: Any) -> None:
        begin(self, site, *rest)
        self.own = SiteWorker(site)

    def taken(self: Any, _: Dataset) -> None:
        take(self, self.own.data_for(self._study, self.network, self.own.site.data).dataset)

    patch.setattr(rank_process._StudyAtRank, "__init__", begun)
    patch.setattr(rank_process._StudyAtRank, "take", taken)


def ranks_keep_what_they_have(patch: pytest.MonkeyPatch) -> None:
    """Hand the records out once, whoever has no budget left since."""
    honest, number = rank_process.Workers._hand_out, itertools.count()

    def hand_out(self: Any, group: Any, dataset: Dataset) -> None:
        if not self._records or next(number) < 1:
            honest(self, group, dataset)

    patch.setattr(rank_process.Workers, "_hand_out", hand_out)


def a_full_disk_is_an_error(patch: pytest.MonkeyPatch) -> None:
    """Raise where states at the cut cannot be kept."""
    honest = PrefixStore.keep

    def keep(self: PrefixStore, *rest: Any) -> Any:
        if isinstance(kept := honest(self, *rest), prefix_store._NotStored):
            raise InfrastructureError("the disk is full")
        return kept

    patch.setattr(PrefixStore, "keep", keep)


def counts_in_a_receipt(patch: pytest.MonkeyPatch) -> None:
    """Name the ledger's entry by its number, as earlier releases did."""
    honest = withdraw._receipt

    def receipt(site: Site, ledger: Ledger, entry: Any, releases: Any) -> dict[str, Any]:
        return honest(site, ledger, entry, releases) | {"entry": entry.seq}

    patch.setattr(withdraw, "_receipt", receipt)


def keeps_draws_in_its_folder(patch: pytest.MonkeyPatch) -> None:
    honest = SiteWorker.__init__

    def begun(self: SiteWorker, site: Site, *rest: Any) -> None:
        honest(self, site, *rest)
        self.draws = Stored(site.site.state)

    patch.setattr(SiteWorker, "__init__", begun)


def starts_as_before_any_study(patch: pytest.MonkeyPatch) -> None:
    """Let what is checked of the records keep the site away in mid-study, too."""
    patch.setattr(studies, "under_way", lambda _: {})


Leak = Callable[[pytest.MonkeyPatch], None]
LEAKS: tuple[tuple[Leak, Case, str], ...] = (
    (by_the_true_count, pins.ORDINARY, "on the wire"),
    (says_how_many, pins.ORDINARY, "on the wire"),
    (says_its_loss, pins.ORDINARY, "on the wire"),
    (drops_one_more, pins.ORDINARY, "the sum moved"),
    (gives_up, pins.ORDINARY, "the sum moved"),
    (clips_at_twice, pins.ORDINARY, "the sum moved"),
    (clips_at_twice, pins.STATISTICS, "the sum moved"),
    (clamps, pins.SHARED, "another sum is opened"),
    (masks_nothing, pins.SHARED, "not masked"),
    (says_its_true_size, pins.SHARED, "on the wire"),
    (says_how_long_its_sum_is, pins.SHARED, "on the wire"),
    (clips_at_twice, pins.SHARED, "the sum moved"),
    (ranks_read_for_themselves, pins.RANKS_ENDED, "the sum moved"),
    (ranks_keep_what_they_have, pins.RANKS_FOR_LIFE, "the sum moved"),
    (a_full_disk_is_an_error, pins.STATES, "the sum moved"),
    (counts_in_a_receipt, pins.RECEIPTS, "on the wire"),
    (keeps_draws_in_its_folder, pins.PUT_BACK, "masked for two sets"),
    (starts_as_before_any_study, pins.ATTESTED, "on the wire"),
)


@pytest.mark.parametrize("leak, case, shows", LEAKS, ids=[leak.__name__ for leak, *_ in LEAKS])
def test_a_worker_that_leaks_is_caught(
    leak: Leak, case: Case, shows: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(case, bases)
    leak(monkeypatch)
    with pytest.raises(AssertionError, match=shows):
        check(case, bases)
