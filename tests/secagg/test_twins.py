"""Twins: each rule of secure aggregation taken away, and a test that misses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.client import secure_round
from fedtune.dp.accountant import Steps
from fedtune.ledger.entries import Charge
from fedtune.ledger.ledger import Ledger
from fedtune.secagg import draw as draws
from fedtune.secagg import masks, statement
from fedtune.secagg.statement import Draw
from tests.secagg.model import World
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
from tests.secagg.unit_sites import PINNED, SIGMA

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
    monkeypatch.setattr(Ledger, "release", lambda *_: None)
    monkeypatch.setattr(draws, "destroy", lambda *_: None)
    said = world.readied(*PINNED)
    world.network.saw = _without_the_key(world.saw)
    world.ask_words("a", said)
    with pytest.raises(AssertionError, match="one draw, two sets"):
        world.ask_words("a", said[:3])


def _without_the_key(real: Any) -> Any:
    """World.saw, but for what it finds of keys on disk."""

    def saw(*given: Any) -> None:
        try:
            real(*given)
        except AssertionError as error:
            if "key kept" not in str(error):
                raise

    return saw


def test_the_twin_that_keeps_the_key_is_caught(world: World, monkeypatch: Patch) -> None:
    monkeypatch.setattr(draws, "destroy", lambda *_: None)
    said = world.readied("a", "b", "c")
    with pytest.raises(AssertionError, match="key kept"):
        world.ask_words("a", said)


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
