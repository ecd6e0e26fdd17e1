"""Methods of other groups: their strategies keep the contracts, their plans are valid, and each
does what its paper says on a tiny base."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.medquad.prepare import DOCUMENTS
from examples.methods import compare, fed_sb
from examples.methods.compare import (
    METHODS,
    OFF,
    PluginBench,
    Results,
    Run,
    table,
    tuning,
    wanted,
)
from examples.methods.dp_adambc import VARIANCE, DPAdamBC
from examples.methods.prototypes import NearestMean
from examples.methods.rolora import RoLoRA
from examples.mts_dialog.prepare import SECTIONS
from examples.write import Table, jsonl, merged, toml
from fedtune import load_study
from fedtune.audit import contracts
from fedtune.core.errors import ConfigError, PolicyRefused, Refused
from fedtune.core.strategy import STRATEGIES, Strategy
from fedtune.officer.site_files import sites_in
from fedtune.public.start import start
from fedtune.server import store
from fedtune.server.store import Progress
from fedtune.strategies.discriminant import BIAS, WEIGHT
from fedtune.strategies.fedavg import FedAvg
from tests.docs.pages import ROOT
from tests.plugins import install
from tests.simulated import simulate

PROJECT = tomllib.loads((ROOT / "examples/methods/pyproject.toml").read_text(encoding="utf-8"))
POINTS = PROJECT["project"]["entry-points"]
PLAN: Table = {
    "privacy": "off",
    "study": {"name": "methods"},
    "base": {"dtype": "float32"},
    "lora": {"rank": 2, "alpha": 4.0, "modules": ["down_proj"], "last_layers": 2},
    "objective": {"name": "causal_lm", "max_length": 32},
    "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.0, "unit": "record"},
    "strategy": {"min_sites": 2},
    "wire": {"update": "float32"},
}
SITE: Table = {
    "data": {"columns": {"prompt": "q", "completion": "a"}},
    "policy": {"bases": "any", "allow_privacy_off": True, "max_epsilon": 1000.0},
}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "installed", monkeypatch, "fedtune_methods", "", POINTS)


def trained(folder: Path, base: Path, plan: Table, site: Table = SITE, south: int = 20) -> Progress:
    """Simulate a plan over two sites of 20 records. south: the units that one of them declares."""
    for name, declared in (("north", 20), ("south", south)):
        rows = [{"q": f"{name} {n}: ", "a": "Home in a week", "l": "xy"[n % 2]} for n in range(20)]
        jsonl(folder / f"{name}.jsonl", rows)
        own = {"site": {"name": name, "declared_size": declared}, "data": {"path": f"{name}.jsonl"}}
        listed = {"policy": {"strategies": ["release", *compare.PLUGINS]}}
        toml(folder / name / "site.toml", merged(merged(own, site), listed), name)
        jsonl(folder / name / f"{name}.jsonl", rows)
    jsonl(folder / "public.jsonl", [{"q": f"{n} ", "a": f"{n * n}"} for n in range(24)])
    jsonl(folder / "texts.jsonl", [{"q": f"{n} " * n, "l": "xy"[n % 2]} for n in range(2, 14)])
    path = toml(folder / "study.toml", merged(plan, {"base": {"model": str(base)}}), "a study")
    simulate(path, sites_in(folder), folder / "run")
    progress = store.load(folder / "run", load_study(path))
    assert progress is not None
    return progress


# ------------------------------------------------------------------------------- contracts, plans


@pytest.mark.parametrize("made", [RoLoRA, DPAdamBC, NearestMean])
def test_a_strategy_keeps_every_contract(made: Callable[[], Strategy]) -> None:
    results = list(contracts.strategy(made))
    assert len(results) == 5 and [r for r in results if not r.passed] == []


def test_the_distribution_names_the_strategies() -> None:
    assert set(STRATEGIES.installed()) >= set(compare.PLUGINS)
    kinds = [STRATEGIES.load(name) for name in compare.PLUGINS]
    assert kinds == [RoLoRA, DPAdamBC, NearestMean]


def test_every_method_has_three_settings_for_each_epsilon_and_all_are_valid_plans(
    tmp_path: Path,
) -> None:
    for method in METHODS:
        for data in method.plans:
            for epsilon in (*compare.EPSILONS, OFF):
                runs = tuning(data, method.name, epsilon)
                assert len(runs) == (3 if method.tried else 0)
                setting = 0 if method.tried else -1
                for run in (*runs, Run(data, method.name, epsilon, 0, setting, "test")):
                    plan = load_study(toml(tmp_path / f"{run.key}.toml", run.plan(), "a plan"))
                    assert plan.private == bool(run.epsilon)
                    assert plan.training.local_steps == 1


def test_a_plan_that_a_strategy_does_not_carry_is_refused(tmp_path: Path) -> None:
    for name, wrong in {
        "rolora": {},  # A is frozen
        "dp_adambc": {"training": {"learning_rate": 0.5}},
        "nearest_mean": {},  # gradients of an adapter
    }.items():
        plan = merged(merged(PLAN, {"base": {"model": "any"}, "strategy": {"name": name}}), wrong)
        with pytest.raises(ConfigError):
            load_study(toml(tmp_path / "study.toml", plan, "a study"))


def test_a_site_whose_policy_does_not_name_the_strategy_takes_no_part(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PLUGINS", ())
    with pytest.raises((PolicyRefused, Refused), match=r"policy\.strategies does not list"):
        trained(tmp_path, tiny_base, merged(PLAN, {"strategy": {"name": "dp_adambc"}}))


# ------------------------------------------------------------------------------------ the methods


def test_rolora_moves_one_factor_a_round(tmp_path: Path, tiny_base: Path) -> None:
    both = merged(PLAN, {"lora": {"train": "AB"}, "strategy": {"name": "rolora"}})
    ran = [
        trained(tmp_path / str(rounds), tiny_base, merged(both, {"training": {"rounds": rounds}}))
        for rounds in (1, 2)
    ]
    begun = start(ran[0].study).adapter
    for name, now in ran[0].adapter.items():  # B in the first
        assert (now == begun[name]).all() == (".lora_A." in name)
    for name, now in ran[1].adapter.items():  # A in the second
        assert (now == ran[0].adapter[name]).all() == (".lora_B." in name)


def test_fed_sb_trains_a_square_matrix_between_fixed_factors(
    tmp_path: Path, tiny_base: Path
) -> None:
    table = {"rank": 2, "damping": fed_sb.EVEN, "narrow": True}
    public = {"path": "public.jsonl", "licence": "CC0"}
    columns = {"columns": {"prompt": "q", "completion": "a"}}
    plan = merged(PLAN, {"lora": {"a_init": "public", "preconditioner": table}})
    progress = trained(tmp_path, tiny_base, merged(plan, {"public": public | columns}))
    factors = {n: a.astype(float) for n, a in progress.frozen.items() if ".lora_U." in n}
    assert len(factors) == 2
    for name, u in factors.items():
        square = u.T @ u
        np.testing.assert_allclose(square, square[0, 0] * np.eye(2), atol=1e-3 * square[0, 0])
        b = progress.adapter[name.replace(".lora_U.", ".lora_B.")].astype(float)
        r = np.linalg.lstsq(u, b, rcond=None)[0]  # (2, 2), the paper's R
        assert np.abs(r).max() > 0
        np.testing.assert_allclose(u @ r, b, atol=1e-6)


def test_dp_adambc_takes_the_noises_variance_off(tmp_path: Path, tiny_base: Path) -> None:
    sigma = 20.0
    privacy = {"noise_multiplier": sigma, "delta": 1e-3, "unit": "record"}
    options = {"server_learning_rate": 0.1, "beta1": 0.0, "beta2": 0.5, "floor": 1e-4}
    plan = merged(PLAN, {"clipping": {"unit": None}, "strategy": {"name": "dp_adambc"}})
    plan = merged(plan | {"privacy": privacy}, {"strategy": {"options": options}})
    state = trained(tmp_path, tiny_base, plan).strategy
    deviation = sigma * 1.0 / 20 / math.sqrt(2)  # of a site's mean of 20, then of two sites' mean
    assert float(state[VARIANCE]) == pytest.approx(0.5 * deviation**2)
    noised = np.concatenate([a.ravel() for name, a in state.items() if name.startswith("m/")])
    assert noised.size >= 128  # of so many numbers the deviation is known to 6 %
    assert noised.std() == pytest.approx(deviation, rel=0.3)


def test_a_strategy_is_told_the_noise_of_sites_that_count_alike_or_by_size(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites of 20 and 60 declared units: the deviation that is told is that of what arrives."""
    told: list[tuple[float, float]] = []

    def listen(self: FedAvg, units: float, deviation: float) -> None:
        told.append((units, deviation))

    monkeypatch.setattr(FedAvg, "describe_round", listen)
    privacy = {"noise_multiplier": 20.0, "delta": 1e-3, "unit": "record"}
    lora = {"rank": 16, "modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
    plan = merged(PLAN | {"privacy": privacy}, {"clipping": {"unit": None}, "lora": lora})
    plan = merged(plan, {"training": {"learning_rate": 0.5}})
    by_site = {"declared": (1 / 80, 1 / 80), "equal": (1 / 40, 1 / 120)}
    for weights, parts in by_site.items():
        asked = merged(plan, {"strategy": {"weights": weights}})
        adapter = trained(tmp_path / weights, tiny_base, asked, south=60).adapter
        moved = np.concatenate([array.ravel() for array in adapter.values()])
        units, deviation = told.pop()
        assert (units, deviation) == (80, pytest.approx(0.5 * 20.0 * math.hypot(*parts)))
        assert moved.std() == pytest.approx(deviation, rel=0.06)  # of 9,216 numbers, and a signal


def test_no_deviation_is_told_where_there_is_no_one_figure(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(
        FedAvg, "describe_round", lambda _, units, deviation: told.append(deviation)
    )
    trained(tmp_path / "off", tiny_base, PLAN)
    trained(tmp_path / "two", tiny_base, merged(PLAN, {"training": {"local_steps": 2}}))
    assert told[0] == 0 and math.isnan(told[1])


def test_dp_adambc_is_the_papers_step() -> None:
    strategy = DPAdamBC(server_learning_rate=0.1, beta1=0.9, beta2=0.99, floor=1e-3)
    adapter = {"w": np.zeros(3, np.float32)}
    m = v = 0.0
    expected = np.zeros(3)
    for t, update in enumerate(([1.0, -2.0, 0.1], [0.5, 1.0, 0.1]), 1):
        gradient = np.array(update)
        strategy.add({"w": gradient.astype(np.float32)}, 1.0)
        strategy.describe_round(10, 0.5)
        adapter = strategy.apply(adapter)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        moment = np.maximum(v / (1 - 0.99**t) - 0.25, 1e-3)
        expected = expected + 0.1 * m / (1 - 0.9**t) / np.sqrt(moment)
    np.testing.assert_allclose(adapter["w"], expected, rtol=1e-5)


def test_dp_prototypes_are_the_nearest_noised_means(tmp_path: Path, tiny_encoder: Path) -> None:
    changes: dict[str, Any] = {
        "objective": {
            "name": "prototypes",
            "labels": ["x", "y"],
            "options": {"directions": 3, "count_weight": 0.5},
        },
        "public": {
            "path": "texts.jsonl",
            "licence": "CC0",
            "columns": {"text": "q", "label": "l"},
        },
        "clipping": {"max_grad_norm": 1.1181},
        "strategy": {"name": "nearest_mean"},
        "lora": None,
    }
    site = merged(SITE, {"data": {"columns": {"text": "q", "label": "l"}}})
    site["data"]["columns"] = {"text": "q", "label": "l"}
    progress = trained(tmp_path, tiny_encoder, merged(PLAN, changes), site)
    state = progress.strategy
    sums = state["noised/sums"] / float(state["noised/precision"])
    assert sums[:, -1] / 0.5 == pytest.approx([20, 20], abs=1e-3)
    means = sums[:, :-1] / 20
    vectors = np.random.default_rng(0).standard_normal((50, state["basis/mean"].size))
    features = (vectors - state["basis/mean"]) @ state["basis/directions"][:3].T
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    logits = vectors @ progress.adapter[WEIGHT].T + progress.adapter[BIAS]
    assert (logits.argmax(axis=1) == nearest).all()


# ------------------------------------------------------------------------------------- the runner


@pytest.mark.long
@pytest.mark.parametrize("data", list(compare.SETS))
def test_every_method_trains_by_its_plan_at_the_sites_of_its_set(
    data: str, tmp_path: Path, tiny_base: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On invented records and a tiny base, one round each."""
    draw = np.random.default_rng(0)
    sections = [{"dialogue": f"{n} " * 9, "section": SECTIONS[n % 20]} for n in range(160)]
    answers = [
        {"site": source, "doc_id": f"{source}{n // 2}", "question": f"{n}?", "answer": f"{n} days"}
        for source in DOCUMENTS
        for n in range(24)
    ]
    articles = [{"question": f"{n}?", "long_answer": f"{draw.random()}"} for n in range(400)]
    files = {"mts_dialog": sections, "medquad": answers, "pubmedqa": articles}
    for name, rows in files.items():
        jsonl(tmp_path / name / "train.jsonl", rows)
    opened = PluginBench._site
    monkeypatch.setattr(
        PluginBench, "_site", lambda *given: opened(*given).changed(policy={"bases": "any"})
    )
    base = {"model": str(tiny_encoder if data == "mts_dialog" else tiny_base), "dtype": "float32"}
    less: Table = {"base": base, "training": {"rounds": 1}}
    less |= {"start": None} if data == "medquad" else {}  # a head starts at its classes' names
    bench = PluginBench(compare.SETS[data].at(tmp_path, tmp_path), 0, tmp_path / "b", "test.jsonl")
    for method in METHODS:
        for epsilon in (3.0, OFF) if data in method.plans else ():
            run = Run(data, method.name, epsilon, 0, 1 if method.tried else -1, "test")
            adapter, ran = bench.run(run.key, merged(run.plan(), less))
            assert ran["epsilon"] == pytest.approx(epsilon, rel=0.02)
            found = bench.measure(merged(run.plan(), less), adapter)
            assert math.isfinite(found[compare.SETS[data].metric])


def test_a_run_that_is_there_is_not_run_again_and_the_best_setting_is_used(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    grid = ("mts_dialog", ["prototypes"], [3.0], [0, 1])
    results = Results(file)
    for run in wanted(results, *grid):
        results.add(run, {"accuracy": 0.5 + 0.1 * (run.setting == 1), "epsilon_spent": 3.0})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["part"] for line in lines] == 3 * ["validation"] + 2 * ["test"]
    assert [line["setting"] for line in lines] == [0, 1, 2, 1, 1]
    with file.open("a") as cut_off:
        cut_off.write('{"key": "mts_')
    assert list(wanted(Results(file), *grid)) == []
    shown = table(Results(file), [3.0], [0, 1])
    assert "| MTS-Dialog, accuracy | DP prototypes | 0.600 ± 0.000 (2 seeds) |" in shown


ROOT = Path(__file__).resolve().parents[2]
SHOWN = {
    "own": "fedtune's own plan",
    "dp_adambc": "DP-AdamBC",
    "ffa_lora": "FFA-LoRA",
    "rolora": "RoLoRA",
    "fed_sb": "Fed-SB",
    "statistics": "fedtune's class statistics",
    "prototypes": "DP prototypes",
}


def test_the_page_shows_what_was_measured() -> None:
    """Each row of docs/methods.md follows from the lines of the runs."""
    results = Results(ROOT / "docs" / "measured" / "methods.jsonl")
    shown = set[str]()
    rows = table(results, [1.0, 3.0, 8.0, OFF], [0, 1, 2]).splitlines()[2:]
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    measured = {method.title: method.name for method in METHODS}
    for row in rows:
        name, title, *cells = row.strip("| ").split(" | ")
        assert all(cell == "–" or cell.endswith(" (3 seeds)") for cell in cells)
        figures = " | ".join(cell.removesuffix(" (3 seeds)") for cell in cells)
        assert f"| {SHOWN[measured[title]]} | {figures} |" in page
        shown |= {SHOWN[measured[title]]} if name.startswith("MTS-Dialog") else set()
    assert shown == {*SHOWN.values()}
