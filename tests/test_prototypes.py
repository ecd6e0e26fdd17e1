"""Class statistics: what a site sends is the bounded sum by class, whatever basis it is sent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune import load_study
from fedtune.core.config import Site, Study, load_site
from fedtune.core.config.load import validate_study
from fedtune.core.data.load import load_dataset
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models import lora
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.class_statistics import ClassStatistics
from fedtune.core.models.lora import Arrays
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_MEAN, CLASS_SUMS
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import WireError, read_frozen
from fedtune.evaluation.evaluator import Evaluator
from fedtune.evaluation.predict import predict
from fedtune.flower.records import to_record
from fedtune.officer.review import _leaves
from fedtune.officer.site_files import sites_in
from fedtune.public.start import start
from fedtune.public.training import vectors_of
from fedtune.runs.run import Run
from fedtune.server import store
from fedtune.strategies import discriminant
from tests.simulated import noise_from, simulate

LABELS = ["fever", "cough", "rash"]
WORDS = {"fever": ("hot", "sweating"), "cough": ("coughs", "hoarse"), "rash": ("red", "itchy")}
WEIGHT, DIRECTIONS = 0.5, 4
STUDY = """
{privacy}
[study]
name = "notes"
[base]
model = "{base}"
dtype = "float32"
[objective]
name = "prototypes"
max_length = 48
labels = ["fever", "cough", "rash"]
options = {{ directions = {directions}, count_weight = {weight} }}
[start]
head = "public"
[training]
rounds = {rounds}
sampling_rate = 1.0
learning_rate = 1.0
[clipping]
max_grad_norm = 1.1181
{unit}
[strategy]
name = "discriminant"
min_sites = 3
[public]
path = "public.jsonl"
licence = "CC0"
columns = {{ text = "t", label = "l" }}
[evaluation]
path = "judges.jsonl"
metric = "accuracy"
columns = {{ text = "t", label = "l" }}
[wire]
update = "float32"
{more}
"""
PRIVATE = '[privacy]\nepsilon = 8.0\ndelta = 1e-4\nunit = "patient"\n'
SITE = """
[site]
name = "{name}"
declared_size = 12
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ text = "t", label = "l", patient = "who" }}
[policy]
max_epsilon = 1000.0
bases = "any"
max_epsilon_per_study = 100.0
max_fallback_epsilon = 1000.0
min_noise_multiplier = 0.05
allow_privacy_off = true
"""


def note(label: str, number: int) -> str:
    return f"{4 * (WORDS[label][number % 2] + ' ')}{number}"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lay_out(
    folder: Path, base: Path, privacy: str = 'privacy = "off"', rounds: int = 1, more: str = ""
) -> Path:
    """A study whose public file lacks a class, and three sites of twelve patients with one to three
    notes each, of several classes."""
    table, off = ("", privacy) if privacy.startswith("privacy") else (privacy, "")
    unit = 'unit = "patient"' if off else ""
    filled = {"unit": unit, "privacy": off, "base": base, "rounds": rounds, "more": table + more}
    text = STUDY.format(directions=DIRECTIONS, weight=WEIGHT, **filled)
    (folder / "study.toml").write_text(text)
    known = LABELS[:2]
    public = [{"t": note(known[n % 2], n), "l": known[n % 2]} for n in range(16)]
    write(folder / "public.jsonl", public)
    judges = [{"t": note(label, 50 + n), "l": label} for label in LABELS for n in range(4)]
    write(folder / "judges.jsonl", judges)
    for number, name in enumerate(("a", "b", "c")):
        rows = [
            {"who": f"p{patient}", "t": note(label, 10 * number + patient), "l": label}
            for patient in range(12)
            for label in LABELS[: 1 + patient % 3]
        ]
        write(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.toml").write_text(SITE.format(name=name))
    return folder / "study.toml"


def class_counts(progress: store.Progress) -> np.ndarray:
    """The noised number of patients of each class, of all rounds."""
    state = progress.strategy
    return state[discriminant.NOISED][:, -1] / state[discriminant.PRECISION] / WEIGHT


def sums_by_hand(study: Study, site: Site, basis: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """A site's class sums, record by record: features bounded to length 1, the count's weight,
    averaged over a patient's records."""
    network = build(study)
    dataset = load_dataset(site.data, study, network.tokenizer)
    total = np.zeros((len(LABELS), len(basis) + 1))
    for members in dataset.by_unit:
        for index in members:
            example = dataset.examples[index]
            ids = torch.tensor(np.array(example.input_ids))[None].long()
            mask = torch.ones_like(ids, dtype=torch.bool)
            states = network.hidden(network.prefix(ids, mask), mask)
            features = basis @ (network.pool(states, mask)[0].double().numpy() - mean)
            features /= max(1.0, float(np.linalg.norm(features)))
            total[example.label] += np.append(features, WEIGHT) / len(members)
    return total


def sent(study: Study, site: Site, frozen: Arrays, adapter: Arrays) -> Arrays:
    """What a site's round without noise sends."""
    network = build(study)
    network.adopt(study, frozen)
    data = CachedDataset(network, load_dataset(site.data, study, network.tokenizer))
    plan = non_private_plan(study, site.site.declared_size)
    return local_round(study, data, plan, MemoryLog(), 1, adapter)


def test_what_is_sent_is_the_mean_of_bounded_sums_by_class(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    made = start(load_study(lay_out(tmp_path, tiny_encoder)))
    basis = made.frozen[CLASS_BASIS].astype(np.float64)
    mean = made.frozen[CLASS_MEAN].astype(np.float64)
    assert made.study.objective.basis_digest == lora.digest(made.frozen)
    site = load_site(tmp_path / "a.toml")
    update = sent(made.study, site, made.frozen, made.adapter)
    expected = sums_by_hand(made.study, site, basis, mean)
    assert update.keys() == {CLASS_SUMS} and update[CLASS_SUMS].shape == (3, DIRECTIONS + 1)
    np.testing.assert_allclose(update[CLASS_SUMS] * 12, expected, atol=1e-4)
    # The last column counts patients: one with notes of two classes is half a patient of each.
    assert expected[:, -1].sum() / WEIGHT == pytest.approx(12)
    # Twin: with another basis, or with records that are longer than 1, the sums are others.
    assert np.abs(sums_by_hand(made.study, site, 100 * basis, mean) - expected).max() > 0.1
    again = sent(made.study, site, made.frozen, {n: a + 1 for n, a in made.adapter.items()})
    np.testing.assert_array_equal(again[CLASS_SUMS], update[CLASS_SUMS])  # whatever the head is


@pytest.mark.parametrize("secure", [False, True])
def test_a_class_that_public_records_lack_is_learnt(
    tmp_path: Path, tiny_encoder: Path, secure: bool
) -> None:
    table = "[secure_aggregation]\ncolluding = 1\n" if secure else ""
    path = lay_out(tmp_path, tiny_encoder, PRIVATE.replace("8.0", "95.0"), more=table)
    with noise_from(7):
        report = simulate(path, sites_in(tmp_path), tmp_path / "run")
    assert report["privacy"]["epsilon"] == pytest.approx(95, rel=0.02)
    progress = store.load(tmp_path / "run", load_study(path))
    assert progress is not None and progress.adapter.keys() == {"head.weight", "head.bias"}
    counts = class_counts(progress)
    assert counts.sum() == pytest.approx(36, abs=4)
    rows = [{"t": note(label, 90 + n), "l": label} for label in LABELS for n in range(6)]
    found = predict(Run(tmp_path / "run"), rows)
    right = [chosen == row["l"] for chosen, row in zip(found.predicted, rows, strict=True)]
    assert sum(right) >= 10
    assert sum(right[12:]) >= 2  # of a class of which the public file has no record
    evaluator = Evaluator(progress.study, progress.frozen)
    known_before, known = (
        evaluator.by_class(arrays)[2]["recall"] for arrays in (progress.origin, progress.adapter)
    )
    assert known > known_before


def test_rounds_add_up_and_a_run_that_is_resumed_goes_on(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    path = lay_out(tmp_path, tiny_encoder, rounds=3)
    simulate(path, sites_in(tmp_path), tmp_path / "run")
    whole = store.load(tmp_path / "run", load_study(path))
    assert whole is not None and whole.round == 3
    assert class_counts(whole).sum() == pytest.approx(36, abs=1e-3)  # each patient once
    again = simulate(path, sites_in(tmp_path), tmp_path / "run", resume=True)
    kept = store.load(tmp_path / "run", load_study(path))
    assert kept is not None and len(again["rounds"]) == 3
    assert all((kept.strategy[name] == array).all() for name, array in whole.strategy.items())


# ------------------------------------------------------------------------- hostile coordinators


def test_no_basis_and_no_vector_makes_statistics_longer_than_the_bound() -> None:
    layer = ClassStatistics(6, 3, 2, torch.device("cpu"))
    draw = np.random.default_rng(0)
    vectors = torch.tensor(draw.normal(size=(8, 6)) * 10.0 ** draw.integers(-3, 38, (8, 1)))
    vectors = vectors.float()
    vectors[5, 2], vectors[6, 0], vectors[7] = torch.nan, torch.inf, 3e38
    for scale in (1e-30, 1.0, 1e3):
        basis = (scale * np.sign(draw.normal(size=(3, 6)))).astype(np.float32)
        layer.load({CLASS_BASIS: basis, CLASS_MEAN: np.full(6, 1e3, np.float32)})
        found = layer.statistics(vectors, WEIGHT)
        assert torch.isfinite(found).all()
        assert longest(found) <= (1 + WEIGHT**2) * (1 + 1e-6)
        assert not found[5:7].any()  # not finite: nothing, and no count
        alone = torch.cat([layer.statistics(vector[None], WEIGHT) for vector in vectors])
        assert torch.equal(found, alone)  # to the last bit
    with pytest.MonkeyPatch.context() as patch:  # twin: no bound
        patch.setattr(torch.linalg, "vector_norm", lambda x, *_, **__: torch.ones(len(x), 1))
        assert longest(layer.statistics(vectors, WEIGHT)) > 2


def longest(rows: torch.Tensor) -> float:
    """The squared length of the longest row."""
    return float(rows.double().square().sum(dim=1).max())


HOSTILE = {
    "not finite": lambda basis, mean: (basis * np.nan, mean),
    "huge": lambda basis, mean: (basis * np.float32(1e30), mean),
    "a huge mean": lambda basis, mean: (basis, mean + np.float32(1e9)),
    "more directions": lambda basis, mean: (np.vstack([basis, basis]), mean),
    "of another base": lambda basis, mean: (basis[:, 1:], mean[1:]),
    "another one": lambda basis, mean: (basis[::-1].copy(), mean),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_basis_is_refused_before_a_record_is_read(
    tmp_path: Path, tiny_encoder: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start(load_study(lay_out(tmp_path, tiny_encoder, PRIVATE)))
    basis, mean = HOSTILE[how](made.frozen[CLASS_BASIS], made.frozen[CLASS_MEAN])
    worker = SiteWorker(load_site(tmp_path / "a.toml"))
    hostile = {CLASS_BASIS: basis, CLASS_MEAN: mean}
    signed = made.study.objective.model_copy(update={"basis_digest": lora.digest(hostile)})
    named = made.study.model_copy(update={"objective": signed})  # the plan names it itself
    read: list[str] = []
    monkeypatch.setattr(SiteWorker, "data_in_study", lambda *rest: read.append("records"))
    with pytest.raises(ModelError):
        worker._prepare_model(made.study, None, hostile, "key")
    if how != "another one":
        with pytest.raises(ModelError):
            worker._prepare_model(named, None, hostile, "key")
    with pytest.raises(ModelError):
        worker._prepare_model(made.study, None, {}, "key")
    assert not read
    worker._prepare_model(made.study, None, made.frozen, "key")  # the plan's own


@pytest.mark.parametrize(
    "sent",
    [
        {CLASS_BASIS: (2, 6)},
        {CLASS_BASIS: (2, 6), CLASS_MEAN: (5,)},
        {CLASS_BASIS: (2, 6), CLASS_MEAN: (6,), "head.weight": (2, 6)},
        {CLASS_BASIS: (12,), CLASS_MEAN: (6,)},
        {CLASS_BASIS: (5000, 6), CLASS_MEAN: (6,)},
    ],
)
def test_a_plan_whose_basis_has_another_form_is_no_message(sent: dict[str, Any]) -> None:
    record = to_record({n: np.zeros(shape, np.float32) for n, shape in sent.items()})
    with pytest.raises(WireError):
        read_frozen(record, None, has_basis=True)
    good = {CLASS_BASIS: np.zeros((2, 6), np.float32), CLASS_MEAN: np.zeros(6, np.float32)}
    assert set(read_frozen(to_record(good), None, has_basis=True)) == set(good)
    with pytest.raises(WireError):
        read_frozen(to_record(good), None)  # of a plan that names no basis


def test_a_label_that_is_none_of_the_classes_counts_for_nothing(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    made = start(load_study(lay_out(tmp_path, tiny_encoder)))
    network = build(made.study)
    network.adopt(made.study, made.frozen)
    data = load_dataset(load_site(tmp_path / "a.toml").data, made.study, network.tokenizer)
    objective = made.study.objective.resolved
    before = UnitGradientEngine(CachedDataset(network, data), objective).matrix([0, 1, 2])
    unknown = [replace(example, label=-100) for example in data.examples]
    none = UnitGradientEngine(
        CachedDataset(network, replace(data, examples=unknown)), objective
    ).matrix([0, 1, 2])
    assert before.norm(dim=1).min() > 0.1 and not none.any()


# ---------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"strategy": {"name": "fedavg"}}, "do not fit"),
        ({"training": {"learning_rate": 0.5}}, "learning_rate"),
        ({"training": {"sampling_rate": 0.5}}, "sampling_rate"),
        ({"training": {"local_steps": 2}}, "local_steps"),
        ({"strategy": {"weights": "equal"}}, "weights"),
        ({"public": None, "start": None}, "public"),
        ({"objective": {"options": {"directions": 0}}}, "directions"),
        ({"objective": {"options": {"count_weight": 0}}}, "max_grad_norm"),
        ({"clipping": {"mode": "normalised"}}, "flat"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, tiny_encoder: Path, changes: dict[str, Any], what: str
) -> None:
    study = load_study(lay_out(tmp_path, tiny_encoder))
    with pytest.raises(ConfigError, match=what):
        validate_study(study.changed(**changes))


def test_too_few_public_records_for_the_directions(tmp_path: Path, tiny_encoder: Path) -> None:
    study = load_study(lay_out(tmp_path, tiny_encoder))
    with pytest.raises(ConfigError, match="16 public records"):
        start(study.changed(objective={"options": {"directions": 20}}))
    made = start(study)
    vectors = CachedDataset(build(made.study), load_dataset(study.public, study, tokenizer(study)))
    features = (vectors_of(vectors)[0] - made.frozen[CLASS_MEAN]) @ made.frozen[CLASS_BASIS].T
    assert np.median(np.linalg.norm(features, axis=1)) == pytest.approx(1, abs=1e-4)


def tokenizer(study: Study) -> Any:
    return build(study).tokenizer


def test_a_site_is_told_which_table_leaves_it(tmp_path: Path, tiny_encoder: Path) -> None:
    study = load_study(lay_out(tmp_path, tiny_encoder, PRIVATE))
    told = " ".join(_leaves(study, load_site(tmp_path / "a.toml")))
    assert "one table of 3 × 5 numbers, noised: for each class the sum" in told
    assert "update of the adapter" not in told
