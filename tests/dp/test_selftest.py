"""The self-test passes on the shipped code, on every kind of study, and each oracle catches a
shipped path that was broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import Study
from fedtune.core.dp import clip, noise
from fedtune.core.dp.plan import DpPlan
from fedtune.core.errors import Refused
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import tiny_network
from fedtune.core.objectives._interface import Batch
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training import selftest
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests import chance
from tests.depth import long_of
from tests.dp.conftest import study

MLP = ["gate_proj", "up_proj", "down_proj"]
PRIVACY = {"noise_multiplier": 1.6, "delta": 1e-4}
LABELS = ["yes", "no", "maybe"]


def of(base: Path, **changes: object) -> Study:
    return study(**{"base": {"model": str(base)}, "privacy": PRIVACY} | changes)


@pytest.fixture
def patients(tiny_base: Path) -> Study:
    return of(tiny_base, privacy=PRIVACY | {"unit": "patient"})


CASES: dict[str, dict[str, object]] = {
    "positions apart": {"lora": {"modules": MLP, "last_layers": 1, "rank": 8}},
    "cut": {"lora": {"modules": ["q_proj", *MLP], "last_layers": 2}},
    "pairs": {"objective": {"name": "dpo", "max_length": 64}},
    "pairs, positions apart": {
        "objective": {"name": "dpo", "max_length": 64, "options": {"variant": "ipo"}},
        "lora": {"modules": MLP, "last_layers": 1, "rank": 8},
    },
    "A and B": {"lora": {"modules": ["q_proj"], "train": "AB"}},
    "normalised": {"clipping": {"mode": "normalised", "max_grad_norm": 0.03}},
    "patients": {"privacy": PRIVACY | {"unit": "patient"}},
    "records of patients": {
        "privacy": PRIVACY | {"unit": "patient", "sampling": "record", "max_records_per_unit": 3},
        "training": {"rounds": 4, "sampling_rate": 0.3, "learning_rate": 0.1},
    },
    "sampled": {"training": {"rounds": 4, "expected_batch": 20, "learning_rate": 0.1}},
}


@pytest.mark.parametrize("case", long_of(["normalised", "sampled", "cut", "pairs"], CASES))
def test_it_passes_on_a_language_model(tiny_base: Path, case: str) -> None:
    results = selftest.run(of(tiny_base, **CASES[case]))
    assert [r.name for r in results] == ["parity", "isolation", "sensitivity", "noise"]
    assert all(r.passed for r in results), results


@pytest.mark.parametrize("lora", [None, {"modules": ["query", "value"]}])
def test_it_passes_on_an_encoder(tiny_encoder: Path, lora: dict[str, object] | None) -> None:
    objective = {"name": "classify", "labels": LABELS}
    results = selftest.run(of(tiny_encoder, lora=lora, objective=objective))
    assert all(r.passed for r in results), results


def test_sensitivity_is_tight(patients: Study) -> None:
    """A bound that nothing comes near would hide a wrong one."""
    (found,) = [r for r in selftest.run(patients) if r.name == "sensitivity"]
    assert found.figure == pytest.approx(1.0, abs=1e-5)


def test_noise_is_judged_from_enough_draws() -> None:
    """By its deviation, and by the products of each draw with the next."""
    draws, within = selftest.COORDINATES * selftest.DRAWS, selftest.SPREAD
    figures = selftest.DRAWS
    right = chance.spread_of(draws, figures)
    assert 1 - within <= right.low and right.high <= 1 + within
    test = chance.Spread(draws, 1 - within, 1 + within)
    assert max(test.missed(0.99), test.missed(1.01)) <= chance.MISSED
    assert chance.deviations(figures) <= 7


def test_nothing_to_test_without_privacy(tiny_base: Path) -> None:
    plain = of(tiny_base, privacy="off", clipping=None)
    assert selftest.run(plain) == []
    selftest.require(plain)


def test_the_studys_own_network_is_not_touched(patients: Study) -> None:
    assert patients.lora is not None
    own = Network(find_base(patients.base.model), torch.float32, patients.lora, labels=0)
    before = own.trainable()
    selftest.require(patients, own)
    assert all((before[n] == a).all() for n, a in own.trainable().items())
    assert not own.states


def test_the_tiny_base_keeps_the_architecture(tiny_base: Path) -> None:
    made = of(tiny_base, lora={"modules": MLP, "last_layers": 1, "rank": 32})
    network = tiny_network(made, find_base(str(tiny_base)))
    config = network.model.config
    assert (config.model_type, config.tie_word_embeddings) == ("llama", True)
    assert config.num_key_value_heads < config.num_attention_heads
    assert network.positionwise
    assert made.lora is not None and made.lora.rank == 32


# ------------------------------------------------------------------------------------- twins


def batch_mean(network: Network, batch: Batch) -> torch.Tensor:
    """Trap 1: a language model's own loss, averaged over the batch's tokens."""
    hidden = network.hidden(batch.prefix, batch.mask)
    rows, positions = torch.nonzero(batch.target_ids != -100, as_tuple=True)
    logits = network.logits(hidden[rows, positions])
    each = torch.nn.functional.cross_entropy(
        logits, batch.target_ids[rows, positions], reduction="none"
    )
    return torch.zeros(len(batch.label)).index_add(0, rows, each) / len(rows)


def centred(network: Network, *inputs: Any) -> torch.Tensor:
    """Trap 18: states normalised across the batch."""
    states = HIDDEN(network, *inputs)
    return states - states.mean(dim=0, keepdim=True)


def clip_at(factor: float) -> Callable[..., torch.Tensor]:
    def wrong(parts: list[torch.Tensor], c: float, *rest: Any) -> torch.Tensor:
        return SCALES(parts, c * factor, *rest)

    return wrong


def nan_passes(parts: list[torch.Tensor], c: float, *_: Any) -> torch.Tensor:
    """Trap 4: Python's min(1, C/nan) is 1."""
    norms = torch.cat(parts, dim=1).double().norm(dim=1).tolist()
    return torch.tensor([min(1.0, c / max(n, 1e-300)) for n in norms], dtype=torch.float64)


def bf16_norms(parts: list[torch.Tensor], c: float, *_: Any) -> torch.Tensor:
    """Trap 15."""
    norms = torch.cat(parts, dim=1).bfloat16().norm(dim=1).double()
    scale = torch.clamp(c / norms, max=1.0)
    return torch.where(torch.isfinite(norms), scale, torch.zeros_like(scale))


def doubled(engine: UnitGradientEngine, rows: list[int], **given: Any) -> Iterator[clip.Chunk]:
    """A chunk's first row rides in its second as well."""
    for chunk in CALL(engine, rows, **given):
        for part in chunk.parts:
            part[1:2] += part[0]
        yield chunk


def sigma_times(factor: float) -> Callable[..., torch.Tensor]:
    return lambda d, std, grid: NOISE(d, std * factor, grid)


def no_noise(d: int, std: float, grid: float) -> torch.Tensor:
    return torch.zeros(d, dtype=torch.int64)


def replayed(d: int, std: float, grid: float) -> torch.Tensor:
    """Trap 5: noise that a seed brings back."""
    drawn = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.round(drawn * (std / grid)).to(torch.int64)


def noisy_chunks(total: torch.Tensor, chunk: clip.Chunk, grid: float, *rest: Any) -> None:
    """Trap 17: noise for each chunk as well."""
    ADD(total, chunk, grid, *rest)
    total += NOISE(len(total), grid * 2.0**20, grid)


def unlogged(plan: DpPlan, total: torch.Tensor, *_: Any) -> torch.Tensor:
    grid = plan.grid
    bound = clip.sensitivity(plan.max_grad_norm, len(total), grid)
    total += noise.gaussian_on_grid(len(total), plan.noise_multiplier * bound, grid)
    return (total.double() * (grid / plan.divisor)).float()


def sums_records(engine: UnitGradientEngine, rows: list[int], **given: Any) -> Iterator[clip.Chunk]:
    """A patient's records added up instead of averaged."""
    for chunk in CALL(engine, rows, **given):
        counts = torch.tensor([len(engine._members[row]) for row in chunk.rows])
        for part in chunk.parts:
            part *= counts[:, None]
        yield chunk


SCALES, NOISE, ADD = clip.scales, noise.gaussian_on_grid, clip.add_clipped
HIDDEN, CALL = Network.hidden, UnitGradientEngine.__call__

TWINS: dict[str, tuple[object, str, Callable[..., Any], set[str]]] = {
    "mean over the batch": (CausalLM, "losses", staticmethod(batch_mean), {"parity", "isolation"}),
    "states centred": (Network, "hidden", centred, {"parity", "isolation"}),
    "records summed": (UnitGradientEngine, "__call__", sums_records, {"parity"}),
    "clip at 2 C": (clip, "scales", clip_at(2.0), {"parity", "sensitivity"}),
    "clip at 1.01 C": (clip, "scales", clip_at(1.01), {"parity", "sensitivity"}),
    "clip at C/2": (clip, "scales", clip_at(0.5), {"parity"}),
    "NaN passes": (clip, "scales", nan_passes, {"sensitivity"}),
    "norms in bf16": (clip, "scales", bf16_norms, {"parity"}),
    "unit doubled": (UnitGradientEngine, "__call__", doubled, {"parity", "isolation"}),
    "σ · 0.99": (noise, "gaussian_on_grid", sigma_times(0.99), {"noise"}),
    "σ · 1.01": (noise, "gaussian_on_grid", sigma_times(1.01), {"noise"}),
    "no noise": (noise, "gaussian_on_grid", no_noise, {"noise"}),
    "seeded noise": (noise, "gaussian_on_grid", replayed, {"noise"}),
    "noise per chunk": (clip, "add_clipped", noisy_chunks, {"noise"}),
    "no line": (DpPlan, "_add_noise", unlogged, {"noise"}),
}


def test_what_a_hostile_row_leaves_behind_is_caught(
    patients: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sums that are computed after it, as by state that a failed row leaves in a network."""
    honest, left = selftest._Bench.total, list[float]()

    def total(bench: Any, data: Any, hostile: Any = None) -> torch.Tensor:
        result = honest(bench, data, hostile) * (3 if left else 1)
        left.extend([1.0] if hostile else [])
        return result

    monkeypatch.setattr(selftest._Bench, "total", total)
    failed = {r.name for r in selftest.run(patients) if not r.passed}
    assert failed == {"sensitivity"}


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_path_is_caught(
    patients: Study, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, what, broken, oracles = TWINS[name]
    monkeypatch.setattr(where, what, broken)
    for other in {"parity", "isolation", "sensitivity", "noise"} - oracles:  # none of them counts
        monkeypatch.setattr(selftest, f"_{other}", lambda _: 0.0)
    failed = {r.name for r in selftest.run(patients) if not r.passed}
    assert failed == oracles


def test_a_failure_refuses_the_round(patients: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "scales", clip_at(2.0))
    with pytest.raises(selftest.SelfTestFailed, match="sensitivity 2") as caught:
        selftest.require(patients)
    assert isinstance(caught.value, Refused)
    assert caught.value.exit_code == 3


def test_what_stops_an_oracle_fails_it(patients: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> torch.Tensor:
        raise ArithmeticError("broken")

    monkeypatch.setattr(clip, "add_clipped", explode)
    failed = {r.name: r.note for r in selftest.run(patients) if not r.passed}
    assert failed["sensitivity"] == "ArithmeticError: broken"


def test_what_stops_an_oracle_is_told_here_and_to_nobody_else(
    patients: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal's words reach the coordinator; a library's tell of memory, disks and folders."""
    words = "/home/ann/cache: cannot allocate 4096 bytes"

    def explode(*_: object) -> torch.Tensor:
        raise MemoryError(words)

    monkeypatch.setattr(clip, "add_clipped", explode)
    with pytest.raises(selftest.SelfTestFailed) as caught:
        selftest.require(patients)
    told = str(caught.value)
    assert "sensitivity stopped" in told and "parity stopped" in told
    assert words not in told and "MemoryError" not in told
    assert f"the self-test's sensitivity stopped: MemoryError: {words}" in caplog.text


def test_an_architecture_that_cannot_be_tested_is_refused(tiny_encoder: Path) -> None:
    """Modules that the base does not have: nothing can be shown, so nothing runs."""
    wrong = of(
        tiny_encoder,
        lora={"modules": ["gate_proj"]},
        objective={"name": "classify", "labels": LABELS},
    )
    (found,) = selftest.run(wrong)
    assert not found.passed
    assert "not found in this base" in found.note


def test_no_log_is_written(
    patients: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    selftest.run(patients)
    assert not list(tmp_path.iterdir())
