"""The tables of site.toml."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from fedtune.core.config.database import Url, anchor_url, redact_url
from fedtune.core.config.known_bases import KNOWN
from fedtune.core.config.scan import ScanTable
from fedtune.core.config.types import (
    Address,
    Columns,
    Count,
    DataFile,
    Delta,
    Digest,
    Finite,
    Fraction,
    Name,
    NotNegative,
    Number,
    Place,
    Positive,
    PublicKey,
    Rank,
    SheetField,
    Source,
    Table,
)
from fedtune.core.files.room import ROUNDS, Room

BASES = tuple(wheel.digest for wheel in KNOWN.values())
MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("query", "key", "value", "dense"),
    *("out_proj", "fc1", "fc2", "projector"),
)


# "release", alone or among names: every plug-in of this release. An entry point of another
# distribution is imported only if it is named.
Plugins = tuple[str, ...] | Literal["release"]
# The figures by which a site may judge a model: each MetricName, and "ece", the expected
# calibration error: how far the probability of a class is from the share of cases in which it is
# right.
AcceptedMetric = Literal["accuracy", "f1", "ece", "loss", "perplexity", "exact_match", "preference"]
RELEASE: Literal["release"] = "release"
SQL, PASSWORD_FILE = "sql", "password_file"  # the source of a database, and its option
A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # in a Path, which keeps one of two slashes
Value = str | int  # a cell is compared with it


class SiteTable(Table):
    """A site's name, its declared size, and where it keeps its ledger."""

    name: Name
    declared_size: Count  # units, as a person declares it; public; no code derives it from the data
    state: Place = Path("state")  # ledger, keys, step log, received plans
    base: Source | None = None  # the base's place at this site, if not the plan's; same digest
    gradient_checkpointing: bool = False  # less memory for activations, a third more time
    cache_memory: NotNegative | None = None  # GiB for states at the cut; None: a quarter of all
    # The most ranks of an adapter that this site trains in a round, where a plan has more; public.
    lora_rank: Rank | None = None
    # The ledger of one run of declared data. `fedtune simulate` writes this key into the run's own
    # copy of the site file.
    ledger: Place | None = None

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_memory is None else int(self.cache_memory * 2**30)

    def plan_file(self, digest: str) -> Path:
        """Return the path at which the site keeps a plan that it was sent, for `fedtune review`.
        The name is the whole digest, so that no other plan takes the file's place while somebody
        reads it."""
        return self.state / "plans" / f"{digest.removeprefix('sha256:')}.json"


class ConsentTable(Table):
    """Patients' consent to the use of their records. The rows of a patient with any row that does
    not say yes in `column`, or whose key is on the list `opt_outs`, are left out before anything is
    computed from them, and again before each round. Guarantee: nobody outside the site can tell who
    was left out, or how many were.

    - opt_outs: a file of hashed keys, one per line, that only this user can read (0600)
    - hashing: how a key's text is hashed. sha256: by sha256; salted-sha256: by the sha256 of the
      salt followed by the key; hmac-sha256: by HMAC-SHA256 with the salt as its key"""

    column: str | None = None
    values: tuple[Value, ...] = ("yes",)  # mean yes; white space around them does not count
    opt_outs: Place | None = None
    hashing: Literal["sha256", "salted-sha256", "hmac-sha256"] = "sha256"
    salt_file: Place | None = None  # only this user may read it (0600); a last line end is cut

    @model_validator(mode="after")
    def _check_combination(self) -> ConsentTable:
        if not (self.column or self.opt_outs):
            raise ValueError("name a column, or a file of opt_outs")
        if not self.values:
            raise ValueError("values: is empty, so that no patient would consent")
        if bool(self.salt_file) != (self.hashing != "sha256"):
            raise ValueError("salt_file: must be given with a salted hashing, and with no other")
        return self

    @property
    def yes(self) -> frozenset[str]:
        """The values that mean yes, as texts without white space around them, which is how a cell
        is compared."""
        return frozenset(str(value).strip() for value in self.values)


class ConvertTable(Table):
    """A plug-in (an entry point fedtune.converters) that converts the rows of each unit, one unit
    at a time."""

    name: Name
    options: dict[str, bool | Finite | str] = Field(default_factory=dict)


class SiteData(DataFile):
    """The site's records: one dataset with one privacy budget. They are files at `path`, or a table
    of the database at `url`. With a url, `path` is the folder of images and recordings."""

    path: Place = Path()
    url: Url | None = None  # sqlite:///, duckdb:/// or postgresql://, without a password
    name: Name = "records"  # the budget's name; a dataset that grows keeps it
    disjoint_from: tuple[Name, ...] = ()  # datasets of this site that share no patient with it
    cohort: Name = "first"  # name of the newest units; change it when patients are added
    # What a person declares the records to be, before a study; None: private records, which are
    # charged to the ledger for life.
    declared: Literal["public", "generated"] | None = None
    source: Name | None = None  # the plug-in that reads the files; None: by suffix
    options: dict[str, bool | Finite | str] = Field(default_factory=dict)  # the source's own
    convert: ConvertTable | None = None  # converts each unit's rows before they are read
    # Only rows take part that have, in each of these columns, the value or one of the values.
    filter: dict[str, Value | tuple[Value, ...]] = Field(default_factory=dict)
    consent: ConsentTable | None = None
    scan: ScanTable | None = None  # scan for identifiers; None: no record is scanned
    _declared_size: int = PrivateAttr(default=0)  # the site's; 0: the table is of no site

    @property
    def declared_size(self) -> int:
        """The site's declared number of units, which is public; 0 for a table that is not part of a
        Site."""
        return self._declared_size

    @model_validator(mode="after")
    def _check_source(self) -> SiteData:
        if self.url is None and "path" not in self.model_fields_set:
            raise ValueError("path: key is missing")
        if A_URL.match(str(self.path)):  # which is not repeated: it may hold a password
            raise ValueError("path: is a url, which belongs in the key url, without a password")
        if self.url and self.source not in (None, SQL):
            raise ValueError(f'url: is read only by source = "{SQL}"')
        if self.options and self.source is None and not self.url:
            raise ValueError('options: belong to a source; name it, as in source = "csv"')
        if any(value == () for value in self.filter.values()):
            raise ValueError("filter: a column has no value, so that no row would match")
        if self.consent and self.consent.opt_outs and not self.columns.patient:
            raise ValueError(
                "consent.opt_outs: is a list of patients, so columns.patient is needed"
            )
        return self

    @property
    def where(self) -> Path | str:
        """The place of the records, as messages at the site name it."""
        return redact_url(self.url) if self.url else self.path

    @property
    def free_query(self) -> bool:
        """Whether a database's query or view, which a person wrote, selects the records. Which
        records of one patient it selects may then depend on other patients."""
        return bool(self.options.get("query") or self.options.get("view"))

    def anchored(self, folder: Path) -> Self:
        """Return a copy in which every path is absolute, also the paths of a database and of its
        password file; relative paths are taken from `folder`."""
        table, options = super().anchored(folder), dict(self.options)
        if (secret := options.get(PASSWORD_FILE)) and isinstance(secret, str):
            options[PASSWORD_FILE] = str(folder / secret)
        url = anchor_url(self.url, folder) if self.url else None
        return table.model_copy(update={"url": url, "options": options})

    @property
    def kept_values(self) -> dict[str, tuple[str, ...]]:
        """The values of `filter` by column, as texts without white space around them, which is how
        a cell is compared: 7 becomes "7"."""
        listed = {
            column: value if isinstance(value, tuple) else (value,)
            for column, value in self.filter.items()
        }
        return {
            column: tuple(str(value).strip() for value in values)
            for column, values in listed.items()
        }


class SiteEvaluation(SiteData):
    """The site's held-out records, about which a plan's queries ask. The answers are noised, and
    paid from this dataset's own budget.

    groups: for each column of groups that a plan names, the column of these records that holds it.
    If a plan's column is not listed here, all patients of this site are in none of its groups.

    What is spent on this dataset counts against [data] too, and the reverse, unless one of the two
    names the other in disjoint_from. This holds for any two datasets of a site."""

    name: Name = "held-out"
    groups: dict[str, str] = Field(default_factory=dict)


class AcceptanceTable(SiteData):
    """Records on which a person at this site judges a finished model, and the rules of that
    judgement, written before anybody sees a figure.

    - thresholds: by metric, the least value or, if lower is better, the largest
    - recall: by class, the least recall
    - groups: columns; the records with each of a column's values are also evaluated separately
    - bands: by column of numbers, such as an age, the edges that divide it into groups
    - least_group: the least size of a group, in patients (without a patient column, in records);
      figures of smaller groups decide nothing
    - differences: by metric, the most by which a group may be worse than all other records
    - gains: by metric, by how much the model must be better than the public start
    - alone: the run of a model that this site trained alone, for comparison

    Guarantee: the vault never reads these records. `fedtune accept` measures on them, `withdraw`
    and `memberships --adopt` read the patients' keys, and `personalise` reads the records to leave
    them out of its training."""

    name: Name = "acceptance"
    thresholds: dict[AcceptedMetric, Finite] = Field(default_factory=dict)
    recall: dict[str, Fraction] = Field(default_factory=dict)
    groups: tuple[str, ...] = ()
    bands: dict[str, tuple[Finite, ...]] = Field(default_factory=dict)
    least_group: Annotated[int, Field(ge=10, le=10**6)] = 20
    differences: dict[AcceptedMetric, NotNegative] = Field(default_factory=dict)
    gains: dict[AcceptedMetric, NotNegative] = Field(default_factory=dict)
    alone: Place | None = None

    @model_validator(mode="after")
    def _check_acceptance(self) -> AcceptanceTable:
        if not (self.thresholds or self.recall or self.gains):
            raise ValueError("thresholds: name at least one bound, here, in recall or in gains")
        tables = (self.thresholds, self.differences, self.gains)
        for name, bound in (item for table in tables for item in table.items()):
            if name not in ("loss", "perplexity") and not 0 <= bound <= 1:
                raise ValueError(f"{name} = {bound:g}: must be between 0 and 1")
        if "ece" in self.gains:  # a model that knows nothing and says so has a small ece
            raise ValueError("gains.ece: a gain is not measured by ece; use another figure")
        if "ece" in self.differences:  # the fewer records, the larger the ece
            raise ValueError(
                "differences.ece: groups cannot be compared by ece; use another figure"
            )
        if unknown := set(self.bands) - set(self.groups):
            raise ValueError(f"bands.{min(unknown)}: is not named in groups")
        for column, edges in self.bands.items():
            if not edges or list(edges) != sorted(set(edges)):
                raise ValueError(f"bands.{column}: edges must rise, as in [18, 65, 80]")
        return self

    @property
    def digest(self) -> str:
        """The sha256 over everything in this table, as "sha256:" and hexadecimal digits. The record
        of a decision by `fedtune accept` holds it."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


class ShareTable(Table):
    """The part of a hospital's settings that one of its memberships needs, read from hospital.toml.

    - membership: the membership's name
    - max_epsilon, max_fallback_epsilon, max_delta, max_rounds: the ceilings of all memberships
      together
    - earlier: whether this membership owns the charges that were made before several memberships
      shared the ledger
    - declared_size: the hospital's declared size
    - memberships: all memberships; disk space is reserved for each beside the ledger
    - disjoint_from: for each registered dataset, the datasets that share no patient with it
    - patients: for each registered dataset, its column of patients; "" for none"""

    membership: Name
    max_epsilon: Positive
    max_fallback_epsilon: Positive
    max_delta: Delta
    max_rounds: Number
    earlier: bool
    declared_size: Count
    memberships: tuple[Name, ...]
    disjoint_from: dict[Name, tuple[Name, ...]]
    patients: dict[Name, str] = Field(default_factory=dict)


class PolicyTable(Table):
    """What this site allows: the limits within which it admits a plan. A plan that is not allowed
    here is refused."""

    max_epsilon: Positive = 8.0  # for all that was ever released and the study, at 2 · max_delta
    max_epsilon_per_study: Positive = 8.0  # for one study, at its own δ
    max_fallback_epsilon: Positive = 8.0  # as max_epsilon, by this site's own noise alone
    max_delta: Delta = 1e-3
    allow_privacy_off: bool = False
    allow_free_query: bool = False  # records selected by a query or a view: outside the guarantee
    allow_declared_data: bool = False  # `fedtune client` with data that [data] declares
    # standing: a plan within these rules runs. signed: only after `fedtune review --sign`.
    # reviewed: as signed, but joining with --answer and the fingerprint that was read out counts
    # as signing the plan in that answer.
    admission: Literal["standing", "reviewed", "signed"] = "standing"
    min_noise_multiplier: NotNegative = 0.3  # smallest σ that this site adds in a round or a query
    min_units: Count = 10  # smallest site.declared_size
    max_grad_norm: Positive = 10.0  # largest C in training
    max_sampling_rate: Fraction = 1.0  # largest q in training
    max_steps: Count = 10_000  # most steps of one study's training
    max_rounds: Number = ROUNDS  # most rounds of all studies together; disk is reserved for each
    max_rank: Rank = 64
    modules: tuple[str, ...] = MODULES  # modules that may get an adapter
    objectives: Plugins = RELEASE
    strategies: Plugins = RELEASE
    modalities: Plugins = RELEASE
    bases: tuple[Digest, ...] | Literal["any"] = BASES  # "any": every base whose digest verifies
    teachers: tuple[Digest, ...] = ()  # digests that this site declares to be public
    coordinators: tuple[str, ...] = ()  # public signing keys; empty: any that passes TLS
    # Public signing keys of the sites with which this site shares noise. A person compared each
    # key's fingerprint with the hospital that holds the key. Empty: no plan with
    # [secure_aggregation] is allowed.
    peers: tuple[PublicKey, ...] = ()
    # What may leave besides noised updates; "sheet": what a person typed in the data sheet.
    release: tuple[Literal["evaluation", "sheet"], ...] = ()
    data_sheet: tuple[SheetField, ...] = ()  # fields that an attested data sheet must hold
    # immediate: an answer is sent as soon as it is paid for and noised. held: it waits at the site
    # until a person lets it go, with `fedtune let-go`.
    answers: Literal["immediate", "held"] = "immediate"
    # required: `fedtune client` runs only if the process with the records has no network, and the
    # process with the network cannot read records. preferred: as far as this machine allows it.
    isolation: Literal["required", "preferred"] = "preferred"

    # The hospital's settings for this membership: read from hospital.toml, never from site.toml.
    hospital: ShareTable | None = None

    @property
    def membership(self) -> str:
        """The name of the membership; "" for a site with a ledger of its own."""
        return self.hospital.membership if self.hospital else ""

    @property
    def own_memberships(self) -> frozenset[str]:
        """The names under which the ledger holds this membership's entries. These are its own name
        and, if it also owns the entries from before several memberships shared the ledger, "". For
        a site with a ledger of its own it is "" alone."""
        earlier = self.hospital is None or self.hospital.earlier
        return frozenset({self.membership, *([""] if earlier else [])})

    @property
    def ceiling(self) -> float:
        """The most ε that the ledger may pay in all; for a membership, the hospital's ceiling."""
        return self.hospital.max_epsilon if self.hospital else self.max_epsilon

    @property
    def fallback_ceiling(self) -> float:
        """The most fallback ε, by the site's own noise alone, that the ledger may pay in all; for a
        membership, the hospital's ceiling."""
        return self.hospital.max_fallback_epsilon if self.hospital else self.max_fallback_epsilon

    @property
    def delta(self) -> float:
        """The δ at which all charges of the ledger are composed; for a membership the hospital's,
        so that all memberships state the same total. A plan's own δ is at most `max_delta`."""
        return self.hospital.max_delta if self.hospital else self.max_delta

    def fits(self, declared_size: int) -> bool:
        """Return whether the policy's δ suits a site of this declared size: whether the δ of all
        charges together is below 1 / `declared_size`."""
        return fits(self.delta, declared_size)


def fits(max_delta: float, declared_size: int) -> bool:
    """Return whether the δ of all charges together, 2 · max_delta (core/dp/filter.py), is below
    1 / `declared_size`."""
    return 2 * max_delta < 1 / declared_size


class HomeTable(Table):
    """The folder (home) that the hospital's memberships share, and this site's name as one of
    them."""

    home: Place  # the folder of hospital.toml and of the hospital's ledger
    membership: Name

    def anchored(self, folder: Path) -> Self:
        """Return a copy with the home's path resolved: absolute, without links or "..", so that one
        home has one path. A relative path is taken from `folder`."""
        return self.model_copy(update={"home": (folder / self.home).resolve()})


class VaultTable(Table):
    """The command by which `fedtune vault --spool` starts the vault, the half of a site with its
    records, anew for each request, for example on another machine.

    run: the command. It ends with the name that the program fedtune has there; the words of
    `fedtune vault` are appended."""

    # The command ends with fedtune, by the name that it has on the machine with the records. It is
    # started for each request, with the words of `fedtune vault` appended. No shell reads it.
    run: str

    @model_validator(mode="after")
    def _check_run(self) -> VaultTable:
        try:
            if self.command:
                return self
        except ValueError:
            raise ValueError("run: a quotation mark is not closed") from None
        raise ValueError("run: name a command")

    @property
    def command(self) -> list[str]:
        """The command of the key `run`, split into its words."""
        return shlex.split(self.run)


class CoordinatorTable(Table):
    """The coordinator's address, and what authenticates the coordinator to the site."""

    answer: Place | None = None  # its answer to `fedtune enroll`; None: the one that --answer kept
    address: Address | None = None  # host:port; without it, the answer's
    fingerprint: str | None = None  # the consortium's, as the coordinator read it out
    proxy: str | None = None  # http(s)://host:port; without it, the environment's HTTPS_PROXY
    proxy_ca: Place | None = None  # the CA of an https:// proxy's certificate


class Site(Table):
    """The settings of one site: where its records are, and what it allows. Guarantee: it is never
    sent; only the few values that `fedtune.core.config` lists leave the machine.

    Two sites are equal when their tables are, whatever file they were loaded from.

    >>> import fedtune
    >>> site = fedtune.Site(
    ...     site=fedtune.SiteTable(name="north", declared_size=200, state="north"),
    ...     data=fedtune.SiteData(path="north.jsonl", columns=fedtune.Columns(text="note")),
    ... )
    >>> site.policy.max_epsilon
    8.0
    """

    site: SiteTable
    data: SiteData
    evaluation: SiteEvaluation | None = None
    acceptance: AcceptanceTable | None = None
    policy: PolicyTable = PolicyTable()
    coordinator: CoordinatorTable | None = None
    vault: VaultTable | None = None
    hospital: HomeTable | None = None  # None: the site's state folder is its home
    _file: Path | None = PrivateAttr(default=None)

    @property
    def home(self) -> Path:
        """The folder with the site's ledger, salt, audit log and receipts of withdrawals: the state
        folder or, for a membership, the hospital's home."""
        return self.hospital.home if self.hospital else self.site.state

    @property
    def room(self) -> Room:
        """The disk space that is reserved beside the site's ledger."""
        if (share := self.policy.hospital) is None:
            return Room(self.home, self.site.declared_size, self.policy.max_rounds)
        users = share.membership, share.memberships
        return Room(self.home, share.declared_size, share.max_rounds, *users)

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]] | Any,
        *,
        site: SiteTable,
        columns: Columns,
        **tables: Any,
    ) -> Site:
        """Make a site from records in memory: a pandas DataFrame, or dicts by column name.

        They are written to records.jsonl in the site's state folder, which only this user can
        read (0600), and are read from there like any other site's.

        - records: the rows of [data]
        - site: the table [site], with the state folder
        - columns: which columns of the rows hold text, label, patient and so on
        - tables: further tables of site.toml, by name: policy, evaluation, coordinator

        >>> import fedtune
        >>> site = fedtune.Site.from_records(
        ...     [{"note": "fever and a cough", "patient": "7"}],
        ...     site=fedtune.SiteTable(name="north", declared_size=200, state="north"),
        ...     columns=fedtune.Columns(text="note", patient="patient"),
        ... )
        >>> site.data.path.name
        'records.jsonl'

        Errors: DataError if a row is not a record; InfrastructureError if the file cannot be
        written."""
        from fedtune.core.config.records import RECORDS, write_records

        data = SiteData(path=site.state.absolute() / RECORDS, columns=columns)
        made = cls(site=site, data=data, **tables)
        write_records(data.path, records)
        return made

    @property
    def free_query(self) -> bool:
        """Whether a query or a view selects the training records or the held-out ones: one
        patient may then decide what happens to another's records, which no ε covers."""
        return any(table.free_query for table in (self.data, self.evaluation) if table)

    @property
    def file(self) -> Path | None:
        """The path of the site.toml from which the site was loaded, which may have changed since;
        None if it was not loaded from a file."""
        return self._file

    def with_peers(self, keys: tuple[str, ...]) -> Self:
        """Return a copy whose policy pins these signing keys of peers."""
        policy = self.policy.model_copy(update={"peers": keys})
        return self.model_copy(update={"policy": policy})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Site) and self.__dict__ == other.__dict__

    __hash__ = Table.__hash__

    @model_validator(mode="after")
    def _check_combination(self) -> Site:
        if not self.policy.fits(self.site.declared_size):
            raise ValueError(
                f"policy.max_delta = {self.policy.max_delta}: twice this value, at "
                "which max_epsilon holds, must be below 1 / site.declared_size; a "
                "larger δ would allow a mechanism to release a whole record"
            )
        if self.evaluation and self.evaluation.name == self.data.name:
            raise ValueError(
                "evaluation.name: must differ from data.name, because each dataset has "
                "its own budget"
            )
        if self.evaluation and bool(self.evaluation.declared) != bool(self.data.declared):
            raise ValueError(
                "evaluation.declared: either both datasets of a site are declared, "
                "or both are private, because a run pays from one ledger"
            )
        if self.evaluation and bool(self.evaluation.consent) != bool(self.data.consent):
            raise ValueError(
                "evaluation.consent: either both datasets of a site have a consent "
                "table, or neither has"
            )
        if self.policy.hospital and not self.hospital:
            raise ValueError(
                "policy.hospital: is read from hospital.toml; leave it out here, and name the "
                "folder of hospital.toml in hospital.home"
            )
        if self.site.ledger and not self.data.declared:
            raise ValueError(
                "site.ledger: allowed only with data.declared; private records are charged in the "
                "ledger in site.state"
            )
        for table in filter(None, (self.data, self.evaluation, self.acceptance)):
            table._declared_size = self.site.declared_size
        return self
