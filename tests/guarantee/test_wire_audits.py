"""An attacker at the wire of the site's own worker: never above the claim, and near it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fedtune.core.dp import noise
from tests import chance
from tests.guarantee.property_files import bases_of
from tests.guarantee.wire_audits import DELTA, EPSILON, MODES, ROUNDS, Found, audit, unhurried

NOISE = noise.gaussian_on_grid


@pytest.fixture(scope="session")
def bases(
    tiny_base: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return bases_of(tmp_path_factory.mktemp("audits"), tiny_base, tiny_encoder)


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    with unhurried():
        yield


# A head of two classes on 32 states; in this many rounds a side its noise tells σ from 0.9 σ, and
# an attack finds an ε of more than 2.
NUMBERS, LESS = 2 * 33, 0.9
MU = chance.mu_at(EPSILON, DELTA)
FEW = max(
    math.ceil(chance.spread_for(LESS, figures=2).draws / 2 / NUMBERS),
    chance.audit_for(MU, reach=chance.mu_at(2, DELTA), figures=2),
)


def held(found: Found) -> None:
    """noise: within 0.3 %, or as near as chance leaves it where that is more: a query has two
    numbers a round."""
    assert 1 - 1e-4 <= found.exact / found.allowed <= 1, found
    draws = round(1 / (2 * found.resolution**2))
    room = chance.spread_of(draws, figures=2)
    assert abs(found.noise - 1) <= 0.003 or room.holds(found.noise), found
    assert found.surely <= found.claimed, found


@pytest.mark.long
def test_a_few_rounds_of_a_head(bases: dict[str, Path]) -> None:
    found = audit("classify, head", bases, FEW)
    held(found)
    assert found.audited > 2, found


@pytest.mark.long
@pytest.mark.parametrize(
    "broken",
    [
        lambda d, s, g: NOISE(d, LESS * s, g),
        pytest.param(lambda d, s, g: torch.zeros(d).long(), marks=pytest.mark.long),
    ],
)
def test_less_noise_is_caught_at_the_wire(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, broken: Callable[..., torch.Tensor]
) -> None:
    monkeypatch.setattr(noise, "gaussian_on_grid", broken)
    monkeypatch.setattr(
        "fedtune.core.training.selftest.require", lambda *_: None
    )  # it sees that too
    with pytest.raises(AssertionError):
        held(audit("classify, head", bases, FEW))


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_at_the_wire_of_every_mode(mode: str, bases: dict[str, Path]) -> None:
    found = audit(mode, bases, ROUNDS)
    print(found)
    held(found)
    if MODES[mode].plan.q == 1.0:
        near = chance.mu_at(0.8 * found.claimed, DELTA)
        claimed = chance.mu_at(found.claimed, DELTA)
        assert chance.audit_for(claimed, reach=near, figures=2) <= ROUNDS
        assert found.audited >= 0.8 * found.claimed, found
