"""Contracts that every strategy in the package keeps; a new file is tested without a line here."""

from __future__ import annotations

import itertools
import json
import weakref

import numpy as np
import pytest

from fedtune.audit import contracts
from fedtune.core.config import Study
from fedtune.core.errors import ConfigError
from fedtune.core.strategy import STRATEGIES, Strategy, build_strategy
from fedtune.strategies import _mean
from fedtune.strategies._mean import RunningMean
from fedtune.strategies.fedadam import FedAdam
from fedtune.strategies.fedavg import FedAvg
from fedtune.strategies.trimmed_mean import TrimmedMean

EVERY = pytest.mark.parametrize("name", STRATEGIES.release())
OF_CHANGES = pytest.mark.parametrize(
    "name", [name for name in STRATEGIES.release() if not STRATEGIES.load(name).of_statistics]
)
SHAPES = {"a.B": (3, 2), "b.B": (5,)}


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in SHAPES.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol)


def one_round(strategy, adapter, updates, weights=None):
    for update, weight in zip(updates, weights or itertools.repeat(1.0), strict=False):
        strategy.add(update, weight)
    return strategy.apply(adapter)


def study(**changes) -> Study:
    body = {
        "study": {"name": "s"},
        "base": {"model": "m"},
        "objective": {"name": "causal_lm"},
        "training": {"learning_rate": 1.0, "rounds": 1, "sampling_rate": 1.0},
        "privacy": "off",
    }
    return Study.model_validate(body | changes)


# ------------------------------------------------------------------------------------ contracts


@EVERY
def test_a_strategy_keeps_every_contract(name):
    kind = STRATEGIES.load(name)
    options = {"momentum": 0.9} if hasattr(kind, "momentum") else {}
    for given in ({}, options):
        results = list(contracts.strategy(lambda given=given: STRATEGIES.build(name, given)))
        assert len(results) == 5 + kind.averages + kind.is_mean
        assert [r for r in results if not r.passed] == []


class Broken(Strategy):
    """A weighted mean of the updates that breaks one contract at a time."""

    is_mean = True

    def __init__(self, how):
        self.how, self.updates, self.kept = how, [], {}

    def add(self, update, weight):
        self.updates.append((update, 1.0 if self.how == "weights are ignored" else weight))
        if self.how == "an update is changed":
            update["layer.B"] += 1.0

    def apply(self, adapter):
        updates = self.updates
        self.updates = [] if self.how != "updates stay" else updates
        if not updates:
            return {n: a + 1e-3 for n, a in adapter.items()} if self.how == "drifts" else adapter
        if self.how == "the last one counts":
            updates = updates[-1:]
        total = sum(weight for _, weight in updates)
        step = {n: sum(w * u[n].astype(np.float64) for u, w in updates) / total for n in adapter}
        if self.how == "momentum is not kept":
            step = {n: step[n] + 0.5 * self.kept.get(n, 0.0) for n in step}
            self.kept = step
        if self.how == "adds up":
            step = {n: s * total for n, s in step.items()}
        moved = {n: a + step[n] for n, a in adapter.items()}
        return moved if self.how == "fp64" else {n: a.astype(np.float32) for n, a in moved.items()}


@pytest.mark.parametrize(
    ("how", "failed"),
    [
        ("", set()),
        ("drifts", {"no update"}),
        ("updates stay", {"no update", "state"}),
        ("adds up", {"identical updates"}),
        ("weights are ignored", {"weighted mean"}),
        ("the last one counts", {"order of arrival"}),
        ("an update is changed", {"inputs"}),
        ("fp64", {"names, shapes and type"}),
        ("momentum is not kept", {"state"}),
    ],
)
def test_a_strategy_that_breaks_a_contract_is_caught(how, failed):
    found = {r.name for r in contracts.strategy(lambda: Broken(how)) if not r.passed}
    assert failed <= found and bool(failed) == bool(found)


@OF_CHANGES
def test_a_round_leaves_nothing_behind(name):
    used, fresh = STRATEGIES.load(name)(), STRATEGIES.load(name)()
    one_round(used, draw(0), [draw(1)])
    fresh.load_state(used.state())
    same(one_round(used, draw(5), [draw(6)]), one_round(fresh, draw(5), [draw(6)]))


@EVERY
def test_an_unknown_option_is_an_error_that_lists_the_known(name):
    with pytest.raises(ConfigError, match=r"strategy\.options\.speed"):
        STRATEGIES.build(name, {"speed": 1.0})


def test_an_unknown_strategy_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=", ".join(STRATEGIES.release())):
        STRATEGIES.load("fedmagic")
    for sly in ("_base", "__init__", "os", "fedavg.FedAvg", ""):
        with pytest.raises(ConfigError):
            STRATEGIES.load(sly)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("fedavg", "server_learning_rate", 0.0),
        ("fedavg", "momentum", 1.0),
        ("fedavg", "momentum", float("nan")),
        ("fedadam", "beta1", 1.0),
        ("fedadam", "beta2", -0.1),
        ("fedadam", "tau", 0.0),
        ("fedadam", "server_learning_rate", -0.1),
        ("trimmed_mean", "trim", 0.5),
        ("trimmed_mean", "trim", -0.1),
    ],
)
def test_options_out_of_range_are_errors(name, option, value):
    with pytest.raises(ConfigError, match=option):
        STRATEGIES.build(name, {option: value})


# ------------------------------------------------------------------------------- one by one


def test_fedavg_weighs():
    moved = one_round(FedAvg(), draw(0), [draw(1), draw(2)], [3.0, 1.0])
    expected = {n: draw(0)[n] + 0.75 * draw(1)[n] + 0.25 * draw(2)[n] for n in SHAPES}
    same(moved, expected, rtol=5e-7)


def test_fedavg_momentum_follows_its_formula():
    strategy = FedAvg(server_learning_rate=0.5, momentum=0.9)
    adapter = one_round(strategy, draw(0), [draw(1)])
    adapter = one_round(strategy, adapter, [draw(2)])
    for n in SHAPES:
        velocity = 0.9 * draw(1)[n] + draw(2)[n]
        expected = draw(0)[n] + 0.5 * draw(1)[n] + 0.5 * velocity
        np.testing.assert_allclose(adapter[n], expected, rtol=1e-5, atol=1e-6)


def test_fedadam_follows_its_formula():
    strategy = FedAdam(server_learning_rate=0.1, beta1=0.8, beta2=0.95, tau=0.01)
    adapter = draw(0)
    m = {n: np.zeros(s) for n, s in SHAPES.items()}
    v = {n: np.full(s, 0.01**2) for n, s in SHAPES.items()}
    expected = {n: a.astype(np.float64) for n, a in adapter.items()}
    for k in (1, 3, 5):
        adapter = one_round(strategy, adapter, [draw(k), draw(k + 1)])
        for n in SHAPES:
            delta = (draw(k)[n].astype(np.float64) + draw(k + 1)[n]) / 2
            m[n] = 0.8 * m[n] + 0.2 * delta
            v[n] = 0.95 * v[n] + 0.05 * delta**2
            expected[n] += 0.1 * m[n] / (np.sqrt(v[n]) + 0.01)
    same(adapter, expected, rtol=1e-5)


def test_fedadam_without_a_rate_steps_as_far_as_the_mean_update():
    """Whatever the updates' scale is; its twin, a fixed rate, does not follow them."""

    def norm(arrays: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum((a.astype(np.float64) ** 2).sum() for a in arrays.values())))

    for rate, follows in ((0.0, True), (0.01, False)):
        lengths = []
        for scale in (1e-3, 1.0, 1e3):
            strategy, zero = (
                FedAdam(server_learning_rate=rate),
                {n: a * 0 for n, a in draw(0).items()},
            )
            adapter = zero
            for k in (1, 3):
                update = {n: np.float32(scale) * a for n, a in draw(k).items()}
                before, adapter = adapter, one_round(strategy, adapter, [update])
            step = {n: adapter[n] - before[n] for n in adapter}
            lengths.append(norm(step) / norm(update))
        assert np.allclose(lengths, 1.0, rtol=1e-4) == follows
    assert not any(a.any() for a in one_round(FedAdam(), zero, [zero]).values())


def test_fedadam_refuses_another_strategys_state():
    with pytest.raises(ConfigError, match="another strategy"):
        FedAdam().load_state({"a.B": np.zeros(3)})
    with pytest.raises(ConfigError, match="another strategy"):
        TrimmedMean().load_state({"m/a.B": np.zeros(3)})


@pytest.mark.parametrize("waiting, block", [(1, 2), (60, 2), (10**9, 2), (60, 2**15)])
def test_the_mean_is_that_of_one_fp64_sum(monkeypatch, waiting, block):
    monkeypatch.setattr(_mean, "_BUFFER", waiting)
    monkeypatch.setattr(_mean, "_BLOCK", block)
    updates, weights = [draw(k) for k in range(11)], [1.0, 0.25, 7.0] * 4
    mean = RunningMean()
    for update, weight in zip(updates, weights, strict=False):
        mean.add(update, weight)
    found = mean.take()
    for name in SHAPES:
        exact = sum(
            u[name].astype(np.float64) * w for u, w in zip(updates, weights, strict=False)
        ) / sum(weights[:11])
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], exact)
    assert mean.take() is None


def test_a_running_mean_holds_few_updates_however_many_come(monkeypatch):
    each = sum(array.nbytes for array in draw(0).values())
    monkeypatch.setattr(_mean, "_BUFFER", 3 * each)
    mean, alive = RunningMean(), []
    for k in range(20):
        update = draw(k)
        alive.append(weakref.ref(update["a.B"]))
        mean.add(update, 1.0)
        del update
        assert sum(array() is not None for array in alive) < 3


def test_fedprox_needs_a_pull_towards_the_start():
    table = {"name": "fedprox"}
    with pytest.raises(ConfigError, match="proximal_mu"):
        build_strategy(study(strategy=table))
    training = {"learning_rate": 1.0, "rounds": 1, "sampling_rate": 1.0, "proximal_mu": 0.1}
    build_strategy(study(strategy=table, training=training))


@pytest.mark.parametrize("n, dropped", [(1, 0), (2, 0), (3, 1), (9, 1), (10, 1), (11, 2), (30, 3)])
def test_trimmed_mean_drops_as_many_as_it_says(n, dropped):
    values = np.arange(n, dtype=np.float64) ** 3
    updates = [{"x": np.array([v], np.float32)} for v in values]
    moved = one_round(TrimmedMean(), {"x": np.zeros(1, np.float32)}, updates)
    np.testing.assert_allclose(moved["x"], values[dropped : n - dropped].mean(), rtol=1e-6)


def test_trimmed_mean_is_not_moved_by_one_wild_site():
    honest = [draw(k) for k in range(1, 5)]
    wild = {n: np.full(s, 1e30, np.float32) for n, s in SHAPES.items()}
    moved = one_round(TrimmedMean(trim=0.2), draw(0), [*honest, wild])
    for n in SHAPES:
        top = np.max([u[n] for u in honest], axis=0)
        assert (moved[n] - draw(0)[n] <= top + 1e-6).all()


def test_trimmed_mean_refuses_weights():
    table = {"name": "trimmed_mean", "weights": "declared"}
    with pytest.raises(ConfigError, match="declared"):
        build_strategy(study(strategy=table))


def test_options_come_through_toml_and_json_alike():
    table = {"name": "fedavg", "options": {"momentum": 0.5}}
    again = Study.model_validate_json(
        json.dumps(json.loads(study(strategy=table).model_dump_json()))
    )
    built = build_strategy(again)
    assert isinstance(built, FedAvg) and built.momentum == 0.5
