"""Run four checks ("oracles") of the code that will train, before a site's first round, on the
study's own architecture at tiny size and on generated records."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example, Passage
from fedtune.core.dp import shared_noise
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import Refused
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.kept_state import SHORT, check_keeps_nothing, count_placeholders
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import multiplier_of
from fedtune.core.models.random_records import generate_file
from fedtune.core.models.random_targets import with_random_targets
from fedtune.core.models.rank_slice import trained_slice
from fedtune.core.models.tiny import generate_records, tiny_columns, tiny_network
from fedtune.core.progress import report, stage
from fedtune.core.training.unit_gradients import UnitGradientEngine

log = logging.getLogger("fedtune.site")
SIZES = (1, 3, 2, 1, 4, 2)  # records of each generated patient
LENGTHS = (*SHORT, 24, 100, 500, 1000, 2048)  # of texts that the base must keep nothing of
SAME = 1e-4  # relative difference of two computations of the same fp32 gradient
ROOM = 1e-5  # relative to C: the vanishing noise; the others' rows do not move at all
SPREAD = 0.003  # relative to σ
COORDINATES, DRAWS = 10**6, 4
# Noise this small (in multiples of C) is the shipped step's σ = 0: it adds 10⁻⁸ √d to a sum of
# length C, and no call without noise has to exist.
VANISHING = 1e-8
HUGE = 1e6


@dataclass(frozen=True)
class Result:
    """The result of one oracle, a check of the self-test.

    - name: the oracle's name
    - passed: whether `figure` is at most `bound`
    - figure: what the oracle measured; infinite if it stopped with an error
    - bound: the largest figure with which it passes
    - seconds: how long it took
    - note: the error if the oracle stopped, else ""; it can mention generated records only"""

    name: str
    passed: bool
    figure: float
    bound: float
    seconds: float
    note: str = ""


class SelfTestFailed(Refused):
    """The self-test found that the code on this machine does not keep the guarantee for this study;
    no round runs."""


class MemoryLog(StepLog):
    """A step log in memory for steps on generated records, which cost no ε. The site's own log is
    not touched."""

    def __init__(self) -> None:
        self.lines: list[Step] = []

    def append(self, step: Step, of_round: int = 1) -> None:
        self.lines.append(step)

    def steps(
        self, study: str | None = None, memberships: Collection[str] | None = None
    ) -> list[Step]:
        return [step for step in self.lines if study in (None, step.study)]


def require(
    study: Study,
    network: Network | None = None,
    declared_size: int = 100,
    lora_rank: int | None = None,
) -> None:
    """Run the self-test's oracles for `study`, and check that each passes.

    - study: the plan to be trained; without privacy no oracle runs
    - network: the network of the study, from which only the base is used; None: the base that
      study.base names is found, and fetched if it is not here
    - declared_size: the site's declared number of units, from which σ and the sampling rate of a
      step follow
    - lora_rank: how many ranks the site trains; None: all of them

    Errors: SelfTestFailed, which names each oracle that failed, its figure and its bound. This text
    leaves the site. For an oracle that stopped with an error it says only that it stopped. The
    error itself may reveal this machine's memory, disk or folders, and is logged on this machine
    alone."""
    results = run(study, network, declared_size, lora_rank)
    failed = [result for result in results if not result.passed]
    for result in failed:
        if result.note:
            log.error("the self-test's %s stopped: %s", result.name, result.note)
    if failed:
        raise SelfTestFailed(
            "the self-test failed: "
            + ", ".join(
                f"{r.name} {'stopped' if r.note else format(r.figure, '.3g')}" for r in failed
            ),
            ", ".join(f"{r.name} at most {r.bound:g}" for r in failed),
            "`fedtune doctor` shows all of it; no ε was spent and no record was read",
        )


def run(
    study: Study,
    network: Network | None = None,
    declared_size: int = 100,
    lora_rank: int | None = None,
) -> list[Result]:
    """Run the oracles for `study`, and return the result of each; [] if the study is not private.

    - network: the network of the study, from which only the base is used; its weights, adapter and
      caches are not touched. None: the base that study.base names is found, and fetched if it is
      not here
    - declared_size: the site's declared number of units, from which σ and the sampling rate of a
      step follow
    - lora_rank: how many ranks the site trains; None: all of them

    If the plan or the tiny base cannot be made, the only result is one named "tiny base", which did
    not pass.
    Guarantee: this reads no record, and writes no file but a tiny base in a temporary folder.
    | oracle      | its figure                                                                |
    | parity      | how far rows and clipped sum differ from plain autograd, record by record |
    | isolation   | how far a row moves if other units' records change or are left out        |
    | sensitivity | how far the sum moves, in C, if an ordinary or hostile unit is removed    |
    | noise       | |σ̂/σ - 1| over 4·10⁶ coordinates without signal; also tests that steps are |
    |             | independent and that each writes its line of the log                      |
    The noise oracle raises a false alarm with probability below 10⁻⁹."""
    if not study.private:
        return []
    bounds = {"parity": SAME, "isolation": 0.0, "sensitivity": 1 + ROOM, "noise": SPREAD}
    started = time.perf_counter()
    try:
        base = network.base if network else find_base(study.base.model, study.base.digest)
        plan = plan_for_site(study, declared_size)
        tiny = tiny_network(study, base)
        # Before it has read anything, since the first text may change it for good.
        lengths = run_check("isolation", 0.0, partial(_check_lengths, study, tiny))
        bench = _Bench(study, tiny, plan, lora_rank)
    except Exception as error:
        seconds = time.perf_counter() - started
        return [Result("tiny base", False, math.inf, 0.0, seconds, _describe_error(error))]
    oracles: dict[str, Callable[[_Bench], float]] = {
        "parity": _parity,
        "isolation": _isolation,
        "sensitivity": _sensitivity,
        "noise": _noise,
    }
    results = []
    for number, (name, run) in enumerate(oracles.items()):
        with stage("self-test"):
            report(name, number, len(oracles))
            result = run_check(name, bounds[name], partial(run, bench))
            results.append(lengths if name == "isolation" and not lengths.passed else result)
    return results


def run_check(name: str, bound: float, measure: Callable[[], float]) -> Result:
    """Run one oracle and return its result. It passes if the figure that `measure` returns is at
    most `bound`, and does not pass if `measure` raises an error. name: the oracle's name."""
    started, note = time.perf_counter(), ""
    try:
        figure = measure()
    except Exception as error:  # whatever stops an oracle must stop the round
        figure, note = math.inf, _describe_error(error)
    return Result(name, figure <= bound, figure, bound, time.perf_counter() - started, note)


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class _Bench:
    """What the oracles run on: the study's network at tiny size, and generated records.

    - study: the plan as the coordinator sent it, at full size
    - network: the tiny network of the study's architecture
    - plan: the site's plan of noised steps for this study
    - lora_rank: how many ranks the site trains; None: all of them

    Attributes that are made from these:

    - data: the generated records
    - still: `plan` with every row in every step, and with vanishing noise
    - columns: the columns of the tiny adapter's B that are trained
    - by: the study's privacy.sampling, which says whether a row is a unit or a record
    - scale: the factor on every gradient that makes the median length of a row 2 C, so that
      clipping takes effect"""

    def __init__(
        self, study: Study, network: Network, plan: DpPlan, lora_rank: int | None = None
    ) -> None:
        self.study = study
        self.network = network
        self.plan = plan
        self.columns = tiny_columns(study, lora_rank)
        privacy = study.privacy
        assert not isinstance(privacy, str)
        cap = privacy.max_records_per_unit if privacy.unit == "patient" else 1
        self.by = privacy.sampling
        self.data = generate_records(study, network, [min(n, cap) for n in SIZES])
        self.still = replace(plan, sampling_rate=1.0, noise_multiplier=VANISHING)
        norms = torch.linalg.vector_norm(self.rows(self.data).double(), dim=1)
        # Every clipping threshold must bite: gradients as long as 2 C at the median.
        self.scale = float(2 * plan.max_grad_norm / norms.median())

    def engine(self, data: Dataset) -> UnitGradientEngine:
        self.network.states.clear()  # the frozen part computes `data` anew, whoever held a state
        objective = self.study.objective.resolved
        engine_name = self.study.training.engine
        cached = CachedDataset(self.network, data)
        return UnitGradientEngine(cached, objective, self.by, engine_name, self.columns)

    def rows(self, data: Dataset) -> torch.Tensor:
        engine = self.engine(data)
        return engine.matrix(range(engine.n_rows))

    def rows_of(self, data: Dataset, unit: int) -> list[int]:
        return data.by_unit[unit] if self.by == "record" else [unit]

    def total(self, data: Dataset, hostile: dict[int, float] | None = None) -> torch.Tensor:
        """Return the sum of the clipped rows of `data`, as one step of this release's code computes
        it. `hostile`: row number -> the value that replaces each number of that row before the
        step."""
        engine = self.engine(data)

        def gradients(rows: list[int]) -> Iterator[Chunk]:
            for chunk in engine(rows):
                for part in chunk.parts:
                    part.mul_(self.scale)
                    for row, value in (hostile or {}).items():
                        part[[at for at, index in enumerate(chunk.rows) if index == row]] = value
                yield chunk

        step = self.still.step(engine.n_rows, engine.dimension, gradients, MemoryLog(), 1)
        return step.double() * self.still.divisor


# ------------------------------------------------------------------------------- the oracles


def _parity(bench: _Bench) -> float:
    """Oracle (a), a check of this self-test: find each row (the gradient of a unit or of a record)
    and the clipped sum with the engine that will train, and again with plain autograd, one record
    at a time. Return the largest relative difference of a row or of the sum."""
    measured, reference = bench.rows(bench.data).double(), _one_by_one(bench)
    rows = float(
        ((measured - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-12)).max()
    )
    c, gamma = bench.plan.max_grad_norm, bench.plan.gamma
    norms = reference.norm(dim=1, keepdim=True) * bench.scale
    flat = bench.plan.clipping == "flat"
    factor = torch.clamp(c / norms, max=1.0) if flat else c / (norms + gamma)
    expected = (reference * bench.scale * factor).sum(dim=0)
    summed = float((bench.total(bench.data) - expected).norm() / expected.norm())
    return max(rows, summed)


def _one_by_one(bench: _Bench) -> torch.Tensor:
    """Compute each row's gradient by plain autograd, one record at a time, and return the
    gradients, (rows, d) fp64. If a row is a unit, its gradient is the mean over its records."""
    data = CachedDataset(bench.network, bench.data)
    objective = bench.study.objective.resolved
    named = bench.network.update_parameters()
    gradients = []
    for index in range(len(bench.data.examples)):
        (batch,) = data.batches([index])
        loss = objective.losses(bench.network, batch).sum()
        grads = torch.autograd.grad(loss, list(named.values()))
        parts = [
            _precondition(bench, name, trained_slice(name, gradient, bench.columns).double())
            for name, gradient in zip(named, grads, strict=True)
        ]
        gradients.append(torch.cat([part.flatten() for part in parts]).cpu())
    if bench.by == "record":
        return torch.stack(gradients)
    return torch.stack(
        [torch.stack([gradients[i] for i in members]).mean(dim=0) for members in bench.data.by_unit]
    )


def _precondition(bench: _Bench, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Multiply the gradient of the tensor `name` by the matrix M of the tensor's preconditioner,
    with M written out in full. Return the gradient as it is if the tensor has no preconditioner."""
    found = multiplier_of(name, bench.network.preconditioner)
    if found is None:
        return gradient
    wide = torch.from_numpy(found.wide).to(gradient)
    whole = found.identity * torch.eye(len(wide)).to(gradient) + found.sign * (wide @ wide.T)
    return whole @ gradient


def _isolation(bench: _Bench) -> float:
    """Oracle (b): measure how far a row moves at most, relative to its length, when only other rows
    or units change. Each unit in turn gets other records, and is then removed; besides, rows are
    computed with fewer rows beside them. No row of another unit may move by a single bit, which
    holds only if a matrix product on this machine does not depend on what is computed with it.

    Errors: RuntimeError if new records do not change the unit's own row, since then nothing was
    tested."""
    engine = bench.engine(bench.data)
    before, worst = engine.matrix(range(engine.n_rows)), 0.0
    norms = before.norm(dim=1).clamp_min(1e-12)
    for n in {1, 2, engine.n_rows // 2, engine.n_rows - 1}:
        rows = list(range(n - 1, -1, -1))
        moved = (engine.matrix(rows) - before[rows]).norm(dim=1) / norms[rows]
        worst = max(worst, float(moved.max()))
    for unit in range(bench.data.n_units):
        edited = bench.rows(_edit_unit(bench.data, unit, bench.study, bench.network))
        moved = (edited - before).norm(dim=1) / norms
        rows = bench.rows_of(bench.data, unit)
        if float(moved[rows].max()) < 100 * SAME:
            raise RuntimeError("a unit's gradient does not depend on its own records")
        moved[rows] = 0.0
        others = [row for row in range(len(before)) if row not in rows]
        left = bench.rows(_remove_unit(bench.data, unit))
        without = (left - before[others]).norm(dim=1) / norms[others]
        worst = max(worst, float(moved.max()), float(without.max()))
    return worst


def _check_lengths(study: Study, network: Network) -> float:
    """Check that the tiny base, which has read nothing yet, keeps nothing of a text for the next
    one. Return the oracle's figure, 0. The base reads texts of one token up to thousands, at most
    the study's length, from the shortest to the longest and back. If it can read files (images and
    so on), each text comes after a file. Errors: KeepsState."""
    longest = min(study.objective.max_length, network.positions or LENGTHS[-1], LENGTHS[-1])
    longest = max(1, longest - count_placeholders(network, study))
    there = [*(length for length in LENGTHS if length < longest), longest]
    check_keeps_nothing(study, network, [*there, *reversed(there[:-1])])
    return 0.0


def _edit_unit(data: Dataset, unit: int, study: Study, network: Network) -> Dataset:
    """Return the records, with the records of `unit` changed: these get reversed tokens, other
    targets, another file and the next label, and keep their lengths.

    - data: generated records, which are not changed
    - unit: the number of the unit; it also seeds the new files
    - study: the plan, whose objective says which labels there are
    - network: the tiny network, for its vocabulary and the kind of file that it reads"""
    draw, examples = np.random.default_rng(unit), list(data.examples)
    record_format = study.objective.resolved.record_format
    labels = 2 if record_format == "unpaired_preference" else max(1, len(study.objective.labels))

    def other(old: Passage) -> Passage:
        targets = np.roll(old.input_ids, 3)
        targets[: len(targets) // 2] = NO_TARGET
        return Passage(old.input_ids[::-1].copy(), targets)

    for index in data.by_unit[unit]:
        old = examples[index]
        first, *second = map(other, old.passages)
        label = (old.label + 1) % labels
        media = generate_file(network, study.objective, draw, old.media).media
        pair = second[0] if second else None
        examples[index] = Example(*first, label, unit, pair, media, old.tiles)
    return with_random_targets(
        Dataset(examples, data.n_units, Counter()), study, network.vocabulary
    )


def _sensitivity(bench: _Bench) -> float:
    """Oracle (c): measure how far the clipped sum moves at most when one unit is removed. Return
    this distance divided by C and by the unit's number of rows.

    Every unit is removed once as it is. One unit is also removed with hostile rows, in which each
    number is huge, not finite or tiny. What is left is then summed after these rows, so that what
    they leave behind in the network is noticed, too."""
    c, worst = bench.plan.max_grad_norm, 0.0
    n, full_sum = bench.data.n_units, bench.total(bench.data)
    without = [bench.total(_remove_unit(bench.data, unit)) for unit in range(n)]
    cases: list[tuple[int, float | None]] = [(unit, None) for unit in range(n)]
    cases += [(4, value) for value in (HUGE, -HUGE, math.nan, math.inf, 1e-30)]
    for unit, value in cases:
        rows = bench.rows_of(bench.data, unit)
        hostile = None if value is None else dict.fromkeys(rows, value)
        sum_with, sum_without = full_sum, without[unit]
        if hostile is not None:
            sum_with = bench.total(bench.data, hostile)
            sum_without = bench.total(_remove_unit(bench.data, unit))
        moved = float((sum_with - sum_without).norm())
        if not moved <= (1 + ROOM) * c * len(rows):  # NaN too
            return math.inf if math.isnan(moved) else moved / (c * len(rows))
        worst = max(worst, moved / (c * len(rows)))
    return worst


def _remove_unit(data: Dataset, unit: int) -> Dataset:
    remaining = [copy.copy(example) for example in data.examples if example.unit != unit]
    renamed = [replace(e, unit=e.unit - (e.unit > unit)) for e in remaining]
    return Dataset(renamed, data.n_units - 1, Counter())


def _noise(bench: _Bench) -> float:
    """Oracle (d): measure how far the standard deviation σ̂ of the drawn noise is from the plan's
    own σ, as |σ̂/σ - 1|.

    Each step sums three chunks of zeros, so that noise which is wrongly added once for each chunk
    is detected. The noise of one step must be independent of another's, so that noise replayed from
    a seed is detected. Each step must write one line of the log. Errors: RuntimeError if steps are
    not independent, or the log does not match them."""
    plan, log = replace(bench.plan, divisor=3.0), MemoryLog()
    noises = [
        plan.step(3, COORDINATES, _silence, log, round_ + 1).numpy() * 3.0
        for round_ in range(DRAWS)
    ]
    logged = {(s.noise_multiplier, s.sampling_rate, s.max_grad_norm) for s in log.lines}
    if len(log.lines) != DRAWS or logged != {
        (plan.own_noise, plan.sampling_rate, plan.max_grad_norm)
    }:
        raise RuntimeError("a noised step and its line in the log disagree")
    std = plan.own_noise * plan.max_grad_norm
    fine = 2.0 ** math.floor(math.log2(std * 2.0**-20))
    grid = fine if plan.sites == 1 else shared_noise.grid(std, plan.max_grad_norm, COORDINATES)
    # The step's own sensitivity: C and what rounding to the grid can add.
    std *= 1 + math.sqrt(COORDINATES) * grid / 2 / plan.max_grad_norm
    square = sum(float(np.vdot(z, z.astype(np.float64))) for z in noises)
    for a, b in pairwise(noises):
        if abs(float(np.vdot(a / std, (b / std).astype(np.float64)))) > 7 * math.sqrt(COORDINATES):
            raise RuntimeError("the noise of one step can be told from another's")
    return abs(math.sqrt(square / (DRAWS * COORDINATES)) / std - 1)


def _silence(rows: list[int]) -> Iterator[Chunk]:
    for row in rows:
        yield Chunk([row], [torch.zeros(1, COORDINATES)])
