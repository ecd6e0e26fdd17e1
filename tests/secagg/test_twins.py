"""Twins: each rule of secure aggregation taken away, and a test that misses it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedtune.core.dp.accountant import Steps
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.secagg import masks, statement
from fedtune.core.secagg.draw import Draws, Waiting
from fedtune.core.secagg.statement import Draw
from fedtune.core.vault import secure_round
from tests.secagg.model import World
from tests.secagg.test_attacks import (
    test_a_folder_put_back_masks_no_draw_a_second_time as put_back,
)
from tests.secagg.test_attacks import (
    test_a_statement_of_an_earlier_attempt_is_of_another_draw as earlier_attempt,
)
from tests.secagg.test_attacks import (
    test_an_attempt_that_was_masked_is_no_answer_to_the_next as next_attempt,
)
from tests.secagg.test_attacks import (
    test_sybils_of_the_coordinator_count_for_nothing as sybils,
)
from tests.secagg.test_masks import (
    test_a_sum_beyond_the_words_wraps_and_is_not_clamped as wraps,
)
from tests.secagg.unit_sites import PINNED, SIGMA, UnitWorker

Patch = pytest.MonkeyPatch


def caught(world: World, does: Callable[[World], Any]) -> None:
    with pytest.raises(AssertionError):
        does(world)
        world.check()


def test_the_twin_that_counts_whoever_is_there_is_caught(world: World, monkeypatch: Patch) -> None:
    def any_site(signing: Any, own: str, pinned: Any, at_least: int) -> None:
        if len({*signing}) < at_least:
            raise statement.StatementError("too few")

    for where in (secure_round, statement):
        monkeypatch.setattr(where, "check_pinned", any_site)
    caught(world, sybils)


def test_the_twin_that_takes_any_set_is_caught(world: World, monkeypatch: Patch) -> None:
    monkeypatch.setattr(statement, "check_pinned", lambda *_: None)
    caught(world, sybils)


def test_the_twin_that_forgets_which_attempt_it_was_is_caught(
    world: World, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(Draw, "label", property(lambda draw: draw.adapter))
    caught(world, next_attempt)


def test_the_twin_that_masks_again_for_another_set_is_caught(
    world: World, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(Ledger, "released", lambda *_: None)
    monkeypatch.setattr(Ledger, "release", lambda *_, **__: None)
    monkeypatch.setattr(Draws, "destroy", lambda *_: None)
    said = world.readied(*PINNED)
    world.network.saw = _without_the_key(world.saw)
    world.ask_words("a", said)
    with pytest.raises(AssertionError, match="one draw, two sets"):
        world.ask_words("a", said[:3])


def _without_the_key(real: Any) -> Any:
    """World.saw, but for what it finds of keys that were kept."""

    def saw(*given: Any) -> None:
        try:
            real(*given)
        except AssertionError as error:
            if "key kept" not in str(error):
                raise

    return saw


def test_the_twin_that_keeps_the_key_is_caught(world: World, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Draws, "destroy", lambda *_: None)
    said = world.readied("a", "b", "c")
    with pytest.raises(AssertionError, match="key kept"):
        world.ask_words("a", said)


class Stored(Draws):
    """The twin that keeps its draws in the site's folder, until they were masked."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.file = folder / "draw"

    def keep(self, waiting: Waiting) -> None:
        fields = {"key": waiting.key.private_bytes_raw().hex(), "total": waiting.total.tolist()}
        fields |= {"ready": waiting.ready.text(), "events": waiting.events}
        self.file.write_text(json.dumps([waiting.reservation, fields]))
        super().keep(waiting)

    def find(self, draw: Draw) -> Waiting | None:
        if super().find(draw) is None and self.file.exists():
            reservation, fields = json.loads(self.file.read_text())
            key = X25519PrivateKey.from_private_bytes(bytes.fromhex(fields["key"]))
            total, ready = np.array(fields["total"]), statement.parse(fields["ready"])
            stored = Waiting(total, key, ready, reservation, fields["events"])
            self._waiting[ready.draw] = stored
        return super().find(draw)

    def destroy(self, plan: str, before: tuple[float, float] = (math.inf, 0)) -> None:
        super().destroy(plan, before)
        if not self._waiting:
            self.file.unlink(missing_ok=True)


def keeps_draws_on_disk(world: World, monkeypatch: Patch) -> None:
    real = UnitWorker.__init__

    def made(site: UnitWorker, *given: Any) -> None:
        real(site, *given)
        site.draws = Stored(site.site.site.state)

    monkeypatch.setattr(UnitWorker, "__init__", made)
    for name in PINNED:
        world.restart(name)
        world.prepare(name)


def test_the_twin_that_keeps_draws_on_disk_is_caught(world: World, monkeypatch: Patch) -> None:
    keeps_draws_on_disk(world, monkeypatch)
    with pytest.raises(AssertionError, match="key on disk"):
        world.readied("a")


def test_the_twin_that_keeps_draws_on_disk_masks_one_for_two_sets(
    world: World, monkeypatch: Patch
) -> None:
    keeps_draws_on_disk(world, monkeypatch)
    monkeypatch.setattr(World, "check_memory_alone", lambda *_: None)
    with pytest.raises(AssertionError, match="one draw, two sets"):
        put_back(world)


def test_the_twin_with_one_key_for_all_draws_is_caught(world: World, monkeypatch: Patch) -> None:
    one = masks.new_key()
    monkeypatch.setattr(masks, "new_key", lambda: one)
    caught(world, earlier_attempt)


def test_the_twin_whose_fallback_is_not_charged_is_caught(world: World, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Charge, "fallback", property(_as_if_shared))
    world.readied("a")
    with pytest.raises(AssertionError):
        world.check()


def _as_if_shared(charge: Charge) -> Any:
    return Steps(SIGMA, charge.sampling_rate, charge.steps, charge.records)


def test_the_twin_that_clamps_is_caught(monkeypatch: Patch) -> None:
    """A site that brings its sum into range answers a question about it, with σᵢ alone behind."""
    real = masks.mask
    wraps()
    monkeypatch.setattr(
        masks, "mask", lambda total, *rest: real(np.clip(total, -(2**31), 2**31 - 1), *rest)
    )
    with pytest.raises(AssertionError):
        wraps()
