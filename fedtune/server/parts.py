"""Define the functions and settings with which a coordinator runs a study. Each function imports
the modules that it needs only when it is called. Tests replace the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flwr.serverapp import Grid

from fedtune.core import progress
from fedtune.core.config import EvaluationTable, PublicTable, Study
from fedtune.core.progress import stage
from fedtune.core.strategy import State
from fedtune.core.wire.arrays import Arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.flower.enrol import Member
from fedtune.report.change_plan import Look
from fedtune.server.bound import Mechanism
from fedtune.server.schedule import Clock, SystemClock
from fedtune.server.turns import Turn

Events = list[tuple[float, float, int, int]]  # (σ, sampling rate q, steps, records of one unit)


class Started(Protocol):
    """A study's starting point, with the attributes that a run uses: the completed plan, the
    trainable arrays, the arrays that are sent and not trained, and the strategy's state. It is an
    object of fedtune.public.start.Start, except in tests."""

    @property
    def study(self) -> Study: ...
    @property
    def adapter(self) -> Arrays: ...
    @property
    def frozen(self) -> Arrays: ...
    @property
    def strategy(self) -> State: ...


class Expected(Protocol):
    """The forecast of a run's gain, with the attributes that a run uses: whether no gain is
    expected, a warning, and the forecast as lines and as a dict. It is an object of
    fedtune.evaluation.expected_gain.ExpectedGain, except in tests."""

    @property
    def is_none(self) -> bool: ...
    @property
    def warning(self) -> str: ...
    def lines(self) -> list[str]: ...
    def as_dict(self) -> dict[str, Any]: ...


class Measures(Protocol):
    """Measures adapters on public records, by the methods that a run uses. It is an object of
    fedtune.evaluation.evaluator.Evaluator, except in tests."""

    def measure(self, adapter: Arrays | None) -> dict[str, float]: ...
    def follow(self, adapter: Arrays | None) -> dict[str, float]: ...
    def look(self, champion: Arrays, challenger: Arrays) -> Look: ...
    def gain(self, adapter: Arrays, start: Arrays | None = None) -> dict[str, Any]: ...
    def by_class(self, adapter: Arrays) -> list[dict[str, Any]]: ...
    @property
    def lacking(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...


def _start(study: Study) -> Started:
    from fedtune.evaluation.evaluator import check_evaluation
    from fedtune.evaluation.selection import check_apart
    from fedtune.public.start import start
    from fedtune.server.step import replace_evaluation

    check_evaluation(study)  # before `start`: this takes seconds, LoRA's A from public text minutes
    check_apart(study)
    if study.selection:
        check_evaluation(replace_evaluation(study))
    with stage("before the rounds"):
        return start(study)


def _evaluator(study: Study, frozen: Arrays) -> Measures:
    from fedtune.evaluation.evaluator import Evaluator

    return Evaluator(study, frozen)


def _forecast_gain(
    study: Study, known: State, sizes: Sequence[int], shares: Mapping[str, float], records: int
) -> Expected | None:
    """Forecast how much the sites' records will add to the public start; None if it cannot be
    forecast.

    - study: the completed plan
    - known: the strategy's state before the first round
    - sizes: the sites' declared sizes
    - shares: class -> its share of the sites' units
    - records: the number of evaluation records"""
    from fedtune.evaluation.before_paying import forecast_gain

    with stage("before the rounds"):
        return forecast_gain(study, known, sizes, shares, records)


def _epsilon(events: Events, delta: float) -> float:
    from fedtune.accounting.cross_check import cross_check
    from fedtune.core.dp.accountant import Steps

    return cross_check([Steps(*event) for event in events], delta)


def _budget(study: Study, declared: int) -> Mechanism:
    from fedtune.core.dp.calibration import resolve

    return resolve(study, declared)


def _accountant() -> str:
    from fedtune.accounting.cross_check import ACCOUNTANT

    return ACCOUNTANT


def _engine(study: Study) -> str:
    from fedtune.core.models.build import build
    from fedtune.core.training.engines import choose

    network = build(study)
    trained = list(network.update_parameters().values())
    return choose(study.training.engine, network.trained, trained).name


def _licence(study: Study) -> str:
    from fedtune.core.bases.find import find_base

    return find_base(study.base.model, study.base.digest).licence


def _teacher(study: Study) -> dict[str, Any] | None:
    if study.objective.resolved.teacher_spec is None:  # the usual case, without an import
        return None
    from fedtune.runs.teacher_admission import describe_teacher

    return describe_teacher(study)


def _save(study: Study, adapter: Arrays, frozen: Arrays, folder: Path) -> None:
    """Write an adapter to a folder in PEFT's format.

    - study: the plan, which names the base and the adapter's shape
    - adapter: the trained arrays
    - frozen: the arrays that sites receive and do not train
    - folder: the folder to write"""
    from fedtune.core.models.build import build

    network = build(study)
    network.adopt(study, frozen)
    network.load_trainable(adapter)
    network.save(folder)


def _load(folder: Path) -> Arrays:
    from fedtune.core.models.adapter_files import load_adapter

    return load_adapter(folder)


def _fingerprint(path: Path) -> str:
    from fedtune.core.files.reading import fingerprint

    return fingerprint(path)


def _contents(table: EvaluationTable | PublicTable) -> frozenset[str]:
    from fedtune.evaluation.selection import digests_of

    return digests_of(table)


def _report(out: Path, report: dict[str, Any]) -> None:
    from fedtune.report import write

    progress.report("writing the report")
    write(out, report)


@dataclass(frozen=True)
class Settings:
    """Settings with which a coordinator runs a study.

    - key: the coordinator's signing key
    - receipts: file that keeps the sites' newest receipts from one run to the next; with None only
      the run's checkpoint keeps them
    - plan: file in which the plan is stored as it is sent; with None it is not stored
    - ca: the consortium's certificate (PEM; "" in a simulation)
    - registry: returns, for each admitted site, the public keys that the site's fingerprint covers,
      without the signing key
    - patience: seconds to wait at the start until strategy.min_sites sites admit the plan
    - waits: whether to wait longer than `patience` for sites, as long as none has refused
    - signing: seconds to wait at the start for sites where nobody has signed the plan yet
    - pause: seconds before the first retry of a round (twice as long before the second retry, three
      times as long before the third)
    - turn: makes the study wait for its turn among the coordinator's studies, and ends the study at
      its deadline
    - clock: for a continuous study, the clock that tells the time of day and waits for it
    - upto: for a continuous study, the round after which to stop; with None the study runs until
      somebody stops it
    - skip: for a continuous study, whether to leave out a round that too few sites delivered and
      continue with the next slot
    - anyway: whether to run a study that is not expected to gain anything
    - shares: class -> its share of the sites' units, for classes that the public records lack; the
      forecast of the gain uses it"""

    key: SigningKey = field(default_factory=SigningKey)
    receipts: Path | None = None
    plan: Path | None = None
    ca: str = ""
    registry: Callable[[], Mapping[str, dict[str, str]]] = dict
    patience: float = 120.0
    waits: bool = False
    signing: float = 0.0
    pause: float = 10.0
    turn: Turn = field(default_factory=Turn)
    clock: Clock = field(default_factory=SystemClock)
    upto: int | None = None
    skip: bool = True
    anyway: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Dependencies:
    """The functions that a run calls, and its settings.

    - start: makes what a study begins with: the study, in which the rounds and the digests that
      study.toml left open are filled in; the adapter; the frozen arrays; the strategy's state
    - evaluator: (study, frozen arrays) -> the evaluator, which measures adapters on the study's
      [evaluation] records
    - epsilon: (a list of steps, δ) -> ε. An element of the list is (σ, q, number of steps, records
      of one unit).
    - budget: (study, declared size) -> the sampling rate, the noise multiplier and the number of
      rounds of a site of this size
    - expected: (study, the strategy's state before the first round, the sites' declared sizes,
      class -> its share of the sites' units, number of evaluation records) -> the forecast of the
      gain; None if it cannot be forecast
    - accountant: returns the accountant's name, for the report
    - engine: study -> the name of its training engine, for the report
    - licence: study -> the licence of its base, for the report
    - teacher: study -> the facts about its teacher, None if it has none
    - save: (study, adapter, frozen arrays, folder) writes an adapter to a folder
    - load: reads the adapter in a folder that `save` wrote: name -> array, fp32
    - fingerprint: file or folder -> sha256 of the files' names and contents; "" if there is none
    - contents: a table of public records -> the digests of the records' contents
    - report: (the run's folder, the report's content) writes the report
    - enrolled: grid -> (node -> enrolled member), for the grid's nodes that may take part now; with
      None every connected node may take part
    - expect: called before each exchange with the grid, the nodes that are asked, and the number of
      bytes that each answer may have"""

    start: Callable[[Study], Started] = _start
    evaluator: Callable[[Study, Arrays], Measures] = _evaluator
    epsilon: Callable[[Events, float], float] = _epsilon
    budget: Callable[[Study, int], Mechanism] = _budget
    expected: Callable[[Study, State, Sequence[int], Mapping[str, float], int], Expected | None] = (
        _forecast_gain
    )
    accountant: Callable[[], str] = _accountant
    engine: Callable[[Study], str] = _engine
    licence: Callable[[Study], str] = _licence
    teacher: Callable[[Study], dict[str, Any] | None] = _teacher
    save: Callable[[Study, Arrays, Arrays, Path], None] = _save
    load: Callable[[Path], Arrays] = _load
    fingerprint: Callable[[Path], str] = _fingerprint
    contents: Callable[[EvaluationTable | PublicTable], frozenset[str]] = _contents
    report: Callable[[Path, dict[str, Any]], None] = _report
    enrolled: Callable[[Grid], Mapping[int, Member]] | None = None
    expect: Callable[[Grid, Iterable[int], int], None] = lambda grid, nodes, most: None
    settings: Settings = field(default_factory=Settings)
