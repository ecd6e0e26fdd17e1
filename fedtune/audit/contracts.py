"""Check on generated records whether a plug-in fulfils the contracts of its group. The tests check
the plug-ins of this release, and `fedtune check-plugin` those of other distributions."""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import Study
from fedtune.core.config.site import ConvertTable
from fedtune.core.data.conversion import Conversion, Unconverted
from fedtune.core.data.converters import CONVERTERS, Row
from fedtune.core.data.files import Rejected, rows
from fedtune.core.data.sources import SOURCES, Source
from fedtune.core.data.sources._interface import REASONS
from fedtune.core.data.typed_rows import given_bytes, given_rows, returned_bytes, returned_rows
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.modalities import MODALITIES
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import generate_file
from fedtune.core.models.tiny import generate_records, random_base, tiny_network
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.registry import Group
from fedtune.core.registry.arrays import CLASS_BASIS, CLASS_SUMS
from fedtune.core.strategy import STRATEGIES, Arrays, Strategy
from fedtune.core.training import selftest
from fedtune.core.training.selftest import Result, run_check
from fedtune.observe.trackers import TRACKERS, Tracker
from fedtune.strategies import _posterior, discriminant

GROUPS: dict[str, Group[Any]] = {
    group.name: group
    for group in (OBJECTIVES, STRATEGIES, MODALITIES, SOURCES, CONVERTERS, TRACKERS)
}
SHAPES = {"layer.B": (3, 2), "head.weight": (5,)}  # the shapes of the adapter for strategies
# The sizes of class statistics, and of the base's vectors.
CLASSES = 4
DIRECTIONS = 3
HIDDEN = 6
ROUNDING = 2e-7  # allowed relative difference: one rounding to fp32
BATCH_ROUNDING = (
    1e-4  # allowed relative difference of a loss in a batch from the loss alone, in fp32
)
SECRET = "Zaphod-Beeblebrox-1979"  # text in a broken file, which no message may contain


def check(
    group: str,
    name: str,
    options: Mapping[str, Any] | None = None,
    base: str | None = None,
    file: Path | None = None,
    less: Path | None = None,
) -> Iterator[Result]:
    """Measure a plug-in against each contract of its group, one result after another.

    - group: "objectives", "strategies", "modalities", "sources", "converters" or "trackers"
    - name: the name under which the plug-in is registered in its group
    - options: the plug-in's own options by name; None for their defaults
    - base: the base on whose architecture an objective or a modality is tested; None for a small
      random text model
    - file: the file that a source reads, or whose rows a converter receives
    - less: the same file without one record; needed if a row is not a line of the file

    No record of a site is read, and nothing is charged. Errors: ConfigError if there is no such
    plug-in, it does not have one of the options, or a source or a converter gets no file."""
    options = options or {}
    plugin = GROUPS[group].build(name, options)
    if group == "objectives":
        yield from _with_base(base, lambda model: objective(name, options, model))
    elif group == "modalities":
        yield from _with_base(base, lambda model: modality(name, model))
    elif group == "strategies":
        yield from strategy(lambda: STRATEGIES.build(name, options))
    elif group == "trackers":
        yield from tracker(plugin)
    elif group == "converters":
        if file is None:
            raise ConfigError(
                "a converter is checked on a file, and none was given",
                "--file FILE; each row of it is one unit",
            )
        yield from converter(name, options, file)
    elif file is None:
        suffixes = ", ".join(plugin.suffixes)
        raise ConfigError(
            "a source is checked on a file, and none was given",
            f"--file FILE with the suffix {suffixes}",
        )
    else:
        yield from source(plugin, file, less)


def _with_base(base: str | None, contracts: Callable[[str], Iterator[Result]]) -> Iterator[Result]:
    if base is not None:
        yield from contracts(base)
        return
    with tempfile.TemporaryDirectory(prefix="fedtune-check-") as folder:
        yield from contracts(str(random_base(Path(folder))))


# ------------------------------------------------------------- objectives and modalities


def study_for(
    base: str,
    name: str = "causal_lm",
    options: Mapping[str, Any] | None = None,
    modality: str | None = None,
    engine: str = "auto",
) -> Study:
    """Build a private study on `base` whose unit is the patient. It trains an adapter in the last
    two blocks, or class statistics of the frozen base if the objective needs them.

    - base: the name or the folder of a base
    - name: the name of the objective; one that reads labels gets three classes
    - options: the objective's own options; None for their defaults
    - modality: the name of a modality plug-in; None for this release's modality for such a base
    - engine: how per-record gradients are computed: "auto" for the fastest way, "opacus" for
      Opacus"""
    table: dict[str, object] = {"name": name, "options": dict(options or {}), "max_length": 64}
    objective = OBJECTIVES.build(name, options or {})
    if objective.record_format == "label":
        table["labels"] = ["yes", "no", "maybe"]
    adapter = {"rank": 4, "modules": ["q_proj"], "last_layers": 2}
    tables = {
        "study": {"name": "check-plugin"},
        "base": {"model": base, "dtype": "float32", "modality": modality},
        "objective": table,
        "lora": None if objective.directions else adapter,
        "training": {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": engine},
        "clipping": {},
        "privacy": {"noise_multiplier": 1.6, "delta": 1e-4, "unit": "patient"},
    }
    return Study.model_validate_json(json.dumps(tables))


def objective(name: str, options: Mapping[str, Any], base: str) -> Iterator[Result]:
    """Check an objective: yield one result for each contract below.

    - name: the name under which the objective is registered
    - options: its own options by name
    - base: the name or the folder of the base on whose architecture it is tested

    | contract | is met if |
    | parity, isolation, sensitivity, noise | the self-test passes with each engine |
    | one loss a record | the losses have shape (B,), are fp32 and finite |
    | repeatable | a second call gives the same bits, so there is no dropout and no state |
    | alone or in a batch | a record's loss is the same alone and in a batch |
    """
    for engine in ("auto", "opacus"):
        for result in selftest.run(study_for(base, name, options, engine=engine)):
            yield replace(result, name=f"{result.name} ({engine})")
    study = study_for(base, name, options)
    network = tiny_network(study, find_base(base))
    data = CachedDataset(network, generate_records(study, network, selftest.SIZES))
    yield run_check("one loss a record", 0, lambda: malformed_losses(study, data))
    yield run_check("repeatable", 0, lambda: measure_repeatability(study, data))
    yield run_check(
        "alone or in a batch", BATCH_ROUNDING, lambda: measure_batch_dependence(study, data)
    )


@torch.no_grad()
def malformed_losses(study: Study, data: CachedDataset) -> float:
    """Count the batches whose losses are not one finite fp32 number for each record."""
    objective, wrong = study.objective.resolved, 0
    for batch in data.batches(range(len(data.dataset.examples))):
        losses = objective.losses(data.network, batch)
        well_formed = losses.shape == batch.label.shape and losses.dtype == torch.float32
        wrong += not (well_formed and bool(torch.isfinite(losses).all()))
    return wrong


@torch.no_grad()
def measure_repeatability(study: Study, data: CachedDataset) -> float:
    """Compute the largest difference between a loss and the same loss computed a second time."""
    objective, largest = study.objective.resolved, 0.0
    for batch in data.batches(range(len(data.dataset.examples))):
        again = objective.losses(data.network, batch) - objective.losses(data.network, batch)
        largest = max(largest, float(again.abs().max()))
    return largest


@torch.no_grad()
def measure_batch_dependence(study: Study, data: CachedDataset) -> float:
    """Compute the largest relative difference between a record's loss in a batch and the loss of
    the same record alone."""
    objective, largest = study.objective.resolved, 0.0
    for batch in data.batches(range(len(data.dataset.examples))):
        together = objective.losses(data.network, batch)
        for at, index in enumerate(batch.index.tolist()):
            (single,) = data.batches([index])
            alone = objective.losses(data.network, single)[0]
            largest = max(largest, float((together[at] - alone).abs() / alone.abs().clamp_min(1.0)))
    return largest


def modality(name: str, base: str) -> Iterator[Result]:
    """Check a modality: yield one result for each contract below. name: the plug-in's name. base:
    the name or the folder of the base on whose architecture it is tested.

    | contract | is met if |
    | place-holders | generated records with files pass the modality's own check |
    | too few | a record is rejected if one token less stands for its file than the file needs |
    | tensor | a file's tensor is fp32, finite, has one row for each tile, and is repeatable; |
    | | another file whose tensor has the same shape can be generated |
    | parity, isolation, sensitivity, noise | the self-test passes on records with generated files |
    """
    study = study_for(base, modality=name)
    network = tiny_network(study, find_base(base))
    yield run_check("place-holders", 0, lambda: _count_misplaced(study, network))
    yield run_check("too few", 0, lambda: _too_few(study, network))
    yield run_check("tensor", 0, lambda: _tensors(study, network))
    yield from selftest.run(study)


def _count_misplaced(study: Study, network: Network) -> float:
    """Count the generated records that fail the modality's own check."""
    wrong = 0
    for seed in range(8):
        shown = generate_file(network, study.objective, np.random.default_rng(seed))
        try:
            network.reader.check(shown.ids, shown.tiles)
        except Rejected:
            wrong += 1
    return wrong


def _too_few(study: Study, network: Network) -> float:
    """Count the generated records that pass the modality's check although one place-holder (a token
    that stands for the file) was taken out; 0 if no record has a place-holder."""
    passed = 0
    for seed in range(8):
        shown = generate_file(network, study.objective, np.random.default_rng(seed))
        first = next((at for at, t in enumerate(shown.ids) if t in network.reader.avoid), None)
        if first is None:
            continue
        try:
            network.reader.check(shown.ids[:first] + shown.ids[first + 1 :], shown.tiles)
            passed += 1
        except Rejected:
            continue
    return passed


def _tensors(study: Study, network: Network) -> float:
    """Generate files for the modality, and count those that fail: the reader's tensor of the file
    is not fp32, is not finite, does not have one row for each tile, or differs when it is computed
    again; or the reader generates no second file like it whose tensor has the same shape. network:
    its `reader` is checked."""
    wrong, reader = 0, network.reader
    for seed in range(8):
        draw = np.random.default_rng(seed)
        shown = generate_file(network, study.objective, draw)
        if shown.media is None:
            continue
        first, again = reader.tensor(shown.media), reader.tensor(shown.media)
        alike = reader.generated(draw, shown.media)
        good = first.dtype == torch.float32 and bool(torch.isfinite(first).all())
        good = good and len(first) == shown.tiles and torch.equal(first, again)
        wrong += not (good and alike and reader.tensor(alike).shape == first.shape)
    return wrong


# ------------------------------------------------------------------------------ strategies


def strategy(made: Callable[[], Strategy]) -> Iterator[Result]:
    """Check a strategy: yield one result for each contract below. made: builds a new instance of
    the strategy. "identical updates" is checked only if the strategy's `averages` is true, and
    "weighted mean" only if its `is_mean` is true.

    | contract | is met if |
    | no update | a round without updates changes neither adapter nor state |
    | identical updates | several equal updates move the adapter by one of them |
    | weighted mean | updates move the adapter by a constant times their weighted mean |
    | order of arrival | in another order of updates, the adapter differs by a rounding of fp32 at |
    | | most, and the state by 10⁻¹² at most |
    | inputs | the arrays that the strategy gets are not changed |
    | names, shapes and type | the new adapter has the old one's names and shapes, in fp32 |
    | state | a strategy that is restarted with its state goes on as without the restart |
    """
    bench = _Bench(made)
    yield run_check("no update", 0, lambda: _no_update(bench))
    if made().averages:
        yield run_check("identical updates", ROUNDING, lambda: _compare_identical_updates(bench))
    if made().is_mean:
        yield run_check("weighted mean", ROUNDING, lambda: _mean(bench))
    yield run_check("order of arrival", ROUNDING, lambda: _order(bench))
    yield run_check("inputs", 0, lambda: _inputs(bench))
    yield run_check("names, shapes and type", 0, lambda: _forms(bench))
    yield run_check("state", 0, lambda: _compare_restart(bench))


class _Bench:
    """Builds new strategies that are ready for their first round, and arrays on which to try them:
    an adapter and updates of the same shapes or, for a strategy of class statistics, a head and
    class statistics."""

    def __init__(self, made: Callable[[], Strategy]) -> None:
        self._made = made
        self.of_statistics = made().of_statistics

    def build_strategy(self) -> Strategy:
        strategy = self._made()
        if self.of_statistics:
            draw = np.random.default_rng(0)
            vectors = draw.standard_normal((4 * CLASSES, HIDDEN))
            labels = np.arange(len(vectors)) % (CLASSES - 1)  # one class has no record
            basis = _posterior.choose(vectors, None, DIRECTIONS, 0.5)
            public = _posterior.summarise_public(basis, vectors, labels, CLASSES, None)
            strategy.load_state(discriminant.state_of(basis, public))
            sent = basis.directions[:DIRECTIONS].astype(np.float32)
            strategy.prepare(statistics_study(), {CLASS_BASIS: sent})
        return strategy

    def adapter(self, seed: int) -> Arrays:
        """Return an adapter of random numbers, or a head for a strategy of class statistics. seed:
        determines the numbers."""
        shapes = {discriminant.WEIGHT: (CLASSES, HIDDEN), discriminant.BIAS: (CLASSES,)}
        return self._draw_arrays(seed, shapes if self.of_statistics else SHAPES)

    def update(self, seed: int) -> Arrays:
        """Return one site's update of random numbers, or its class statistics for a strategy that
        reads them. seed: determines the numbers."""
        return self._draw_arrays(
            seed, {CLASS_SUMS: (CLASSES, DIRECTIONS + 1)} if self.of_statistics else SHAPES
        )

    def _draw_arrays(self, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        draw = np.random.default_rng(seed)
        return {n: draw.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}

    def round(self, strategy: Strategy, adapter: Arrays, seeds: Iterable[int]) -> Arrays:
        """Let `strategy` run one round, and return the adapter after the round.

        - adapter: the adapter before the round
        - seeds: one update is drawn from each; the first update has weight 1, the next 2, …"""
        return self.round_of(strategy, adapter, [self.update(seed) for seed in seeds])

    def round_of(self, strategy: Strategy, adapter: Arrays, updates: list[Arrays]) -> Arrays:
        for weight, update in zip(itertools.count(1.0), updates, strict=False):
            strategy.add(update, weight)
        strategy.describe_round(100.0, 0.01)
        return strategy.apply(adapter)


def statistics_study() -> Study:
    """Make a study of class statistics, for a strategy that reads them."""
    tables = {
        "study": {"name": "check-plugin"},
        "base": {"model": "any"},
        "objective": {"name": "prototypes", "labels": list("abcdefghij"[:CLASSES])},
        "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "privacy": "off",
    }
    return Study.model_validate_json(json.dumps(tables))


def _measure_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Compute the largest relative difference between arrays of the same name in two sets of
    arrays; infinite if the sets' names differ."""
    if a.keys() != b.keys():
        return math.inf
    largest = 0.0
    for name, array in a.items():
        scale = max(1.0, float(np.abs(array).max(initial=0.0)))
        gap = float(np.abs(array - b[name]).max(initial=0.0)) / scale
        largest = max(largest, math.inf if math.isnan(gap) else gap)
    return largest


def _no_update(bench: _Bench) -> float:
    fresh, adapter = bench.build_strategy(), bench.adapter(0)
    first = _measure_difference(fresh.apply(adapter), adapter) + _measure_difference(
        fresh.state(), bench.build_strategy().state()
    )
    moved = bench.round(fresh, adapter, [1])
    state = copy.deepcopy(fresh.state())
    return (
        first
        + _measure_difference(fresh.apply(moved), moved)
        + _measure_difference(fresh.state(), state)
    )


def _compare_identical_updates(bench: _Bench) -> float:
    worst = 0.0
    for count, seed in itertools.product((1, 2, 7), range(5)):
        adapter, update = bench.adapter(seed), bench.update(seed + 1)
        moved = bench.round_of(bench.build_strategy(), adapter, [update] * count)
        worst = max(worst, _measure_difference(moved, {n: adapter[n] + update[n] for n in adapter}))
    return worst


def _mean(bench: _Bench) -> float:
    """Run one round on two updates, and one round on each of the updates alone; compare the first
    round's adapter with the weighted mean of the other two. Return the largest relative
    difference."""
    worst = 0.0
    for seed in range(5):
        adapter, seeds = bench.adapter(seed), [seed + 1, seed + 2]
        first, second = (bench.round(bench.build_strategy(), adapter, [s]) for s in seeds)
        mean = {name: (first[name] + 2 * second[name].astype(float)) / 3 for name in adapter}
        worst = max(
            worst, _measure_difference(bench.round(bench.build_strategy(), adapter, seeds), mean)
        )
    return worst


def _order(bench: _Bench) -> float:
    worst = 0.0
    for count, seed in itertools.product((2, 3, 6), range(5)):
        in_order = bench.build_strategy()
        shuffled = bench.build_strategy()
        adapter = bench.adapter(999)
        updates = [(bench.update(seed + k), 1.0 + k) for k in range(count)]
        for update, weight in updates:
            in_order.add(update, weight)
        for k in np.random.default_rng(seed).permutation(count):
            shuffled.add(*updates[k])
        for strategy in (in_order, shuffled):
            strategy.describe_round(100.0, 0.01)
        worst = max(worst, _measure_difference(in_order.apply(adapter), shuffled.apply(adapter)))
        if _measure_difference(in_order.state(), shuffled.state()) > 1e-12:
            return math.inf
    return worst


def _inputs(bench: _Bench) -> float:
    adapter, updates = bench.adapter(0), [bench.update(1), bench.update(2)]
    bench.round_of(bench.build_strategy(), adapter, updates)
    changed = sum(_measure_difference(array, bench.update(k)) for k, array in enumerate(updates, 1))
    return changed + _measure_difference(adapter, bench.adapter(0))


def _forms(bench: _Bench) -> float:
    adapter = bench.adapter(0)
    moved = bench.round(bench.build_strategy(), adapter, [1, 2, 3])
    forms = {name: (array.shape, array.dtype) for name, array in moved.items()}
    expected = {name: (array.shape, np.dtype("float32")) for name, array in adapter.items()}
    return float(forms != expected)


def _compare_restart(bench: _Bench) -> float:
    through, restarted = bench.build_strategy(), bench.build_strategy()
    adapter = bench.round(through, bench.adapter(0), [1, 2])
    state = through.state()
    if any(array.dtype != np.float64 for array in state.values()):
        return math.inf
    restarted.load_state(copy.deepcopy(state))
    first = bench.round(through, adapter, [3, 4])
    second = bench.round(restarted, adapter, [3, 4])
    return _measure_difference(first, second) + _measure_difference(
        through.state(), restarted.state()
    )


# --------------------------------------------------------------------- sources and trackers


def source(plugin: Source, file: Path, less: Path | None = None) -> Iterator[Result]:
    """Check a source: yield one result for each contract below.

    file: the file that the source reads. less: the same file without one record; None to leave out
    one line of `file` at a time.

    | contract | is met if |
    | rows | there are rows; each is a dict by column, or a reason that fedtune knows |
    | repeatable | a second reading gives the same rows |
    | one row at a time | if a record is removed, its row is missing and no other row changes |
    | broken files | they raise no error but a DataError, and no message quotes the file |
    """
    expected = list(rows(file, {}, source=plugin))
    unlisted = [row for row in expected if isinstance(row, str) and row not in REASONS]
    yield run_check("rows", 0, lambda: len(unlisted) if expected else math.inf)
    yield run_check("repeatable", 0, lambda: list(rows(file, {}, source=plugin)) != expected)
    with tempfile.TemporaryDirectory(prefix="fedtune-check-") as name:
        copied = Path(name) / f"copy{file.suffix}"
        yield run_check("one row at a time", 0, lambda: _one_less(plugin, file, copied, less))
        yield run_check("broken files", 0, lambda: _count_mishandled_files(plugin, copied))


def converter(name: str, options: Mapping[str, Any], file: Path) -> Iterator[Result]:
    """Check a converter: yield one result for each contract below.

    - name: the name under which the converter is registered
    - options: its own options by name
    - file: a file whose rows the converter receives

    | contract | is met if |
    | converts | each row of the file is converted, as a unit of its own, in a separate process |
    | repeatable | a second conversion gives the same rows |
    | one unit at a time | all units in one process give the same rows, so none is remembered |
    """
    units = [[row] for row in rows(file, {}) if isinstance(row, dict)]
    table = ConvertTable(name=name, options=dict(options))
    alone = _convert_all(table, units)
    yield run_check("converts", 0, lambda: alone.count(None) if units else math.inf)
    yield run_check("repeatable", 0, lambda: _count_differing(_convert_all(table, units), alone))
    together: list[list[Row] | None] = []
    plugin = CONVERTERS.build(name, options)
    for unit in units:
        try:
            found = plugin.convert(given_rows(given_bytes(unit)))
            together.append(returned_rows(returned_bytes(found)))
        except Exception:
            together.append(None)
    yield run_check("one unit at a time", 0, lambda: _count_differing(together, alone))


def _convert_all(table: ConvertTable, units: list[list[Row]]) -> list[list[Row] | None]:
    """Convert each unit by itself. Return for each unit its converted rows, or None if the
    conversion failed."""
    results: list[list[Row] | None] = []
    with Conversion(table) as conversion:
        for unit in units:
            try:
                results.append(conversion(unit))
            except Unconverted:
                results.append(None)
    return results


def _count_differing(some: list[list[Row] | None], others: list[list[Row] | None]) -> int:
    return sum(one != other for one, other in zip(some, others, strict=True))


def _one_less(plugin: Source, file: Path, copied: Path, less: Path | None) -> float:
    """Remove one row at a time, at most 50, and count the removals after which another row changed
    too.

    - plugin: the source that reads the file
    - file: the whole file
    - copied: the path at which the file without a row is written, with the suffix of `file`
    - less: the file without one record, for a file whose rows are not lines. Only this removal is
      then tried, and the result is 0 if its rows are those of `file` without one, else 1. None:
      lines of `file` are removed one at a time.

    Errors: DataError if the file's rows are not its lines, so that none can be removed."""
    expected = list(rows(file, {}, strict=False, source=plugin))
    if less is not None:
        remaining = list(rows(less, {}, strict=False, source=plugin))
        one_less = [expected[:at] + expected[at + 1 :] for at in range(len(expected))]
        return float(remaining not in one_less)
    lines = file.read_bytes().splitlines(keepends=True)
    first = len(lines) - len(expected)
    if first not in (0, 1):
        raise DataError(
            "the records of this file are not one line each",
            "--less FILE: the same file with one record left out",
        )
    changed = 0
    for at in range(first, min(len(lines), first + 50)):
        copied.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
        remaining = list(rows(copied, {}, strict=False, source=plugin))
        changed += remaining != expected[: at - first] + expected[at - first + 1 :]
    return changed


def _count_mishandled_files(plugin: Source, copied: Path) -> float:
    """Count the broken files whose content is quoted in an error's text or in the reason why a row
    was left out. An error other than a DataError is passed on.

    - plugin: the source that reads the files
    - copied: the path at which each broken file is written"""
    wrong, draw = 0, np.random.default_rng(0)
    for prefix in (None, b"", draw.bytes(4096), b'"'):
        copied.write_bytes(b"" if prefix is None else prefix + SECRET.encode())
        results = list(rows(copied, {}, strict=False, source=plugin))
        messages = [row for row in results if isinstance(row, str)]
        try:
            list(rows(copied, {}, strict=True, source=plugin))
        except DataError as error:
            messages.append(str(error))
        wrong += any(SECRET in text for text in messages)
    return wrong


def tracker(plugin: Tracker) -> Iterator[Result]:
    """Check a tracker: yield one result for each contract below.

    | contract | is met if |
    | events | it accepts the events of a run |
    | data | it does not change an event's data |
    | close | it may be called a second time |
    """
    events: list[tuple[str, dict[str, Any]]] = [
        ("start", {"study": "check-plugin", "rounds": 2, "private": True}),
        ("round", {"round": 1, "participants": ["north", "south"], "quality": {"loss": 1.5}}),
        ("done", {"rounds": 2}),
    ]

    def send_events() -> float:
        for kind, data in events:
            plugin.on_event(kind, data)
        return 0

    before = copy.deepcopy(events)
    yield run_check("events", 0, send_events)
    yield run_check("data", 0, lambda: events != before)

    def close_twice() -> float:
        plugin.close()
        plugin.close()
        return 0

    yield run_check("close", 0, close_twice)
