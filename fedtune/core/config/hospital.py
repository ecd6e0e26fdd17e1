"""The tables of hospital.toml, in the folder (home) that several memberships of a hospital share.

    HOME/hospital.toml     the hospital's ceilings, its datasets and its memberships
    HOME/ledger.db …       one ledger, salt, audit log and receipts of withdrawals for all of them

A membership is a site.toml of its own that names this home in its table [hospital]: it has its own
signing key, network keys, policy and state folder, and pays from the hospital's ledger."""

from __future__ import annotations

import codecs
import os
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TypeVar

from pydantic import Field, model_validator

from fedtune.core.config.database import Url, anchor_url, databases_of
from fedtune.core.config.patient_columns import shorten_column
from fedtune.core.config.site import ConsentTable, ShareTable, Site, SiteData, fits
from fedtune.core.config.types import Count, Delta, Name, Number, Place, Positive, Table
from fedtune.core.errors import ConfigError, FedtuneError
from fedtune.core.files.room import OFFICER, ROUNDS

FILE, FHIR = "hospital.toml", "fhir"
Data = TypeVar("Data", bound=SiteData)


class HospitalTable(Table):
    """A hospital's name, and the size of its largest dataset in units, as a person declares it."""

    name: Name
    declared_size: Count


class CeilingTable(Table):
    """The hospital's ceilings: the most ε that all consortia together may spend on each dataset,
    the δ at which it is computed, and the most rounds for which the ledger pays."""

    max_epsilon: Positive = 8.0  # for everything that was ever released, at 2 · max_delta
    max_fallback_epsilon: Positive = 8.0  # as max_epsilon, by each site's own noise alone
    max_delta: Delta = 1e-3
    max_rounds: Number = ROUNDS  # most rounds of all memberships together


class RegisteredData(Table):
    """A dataset that a person registered in the hospital's home.

    - path, url: the place of its records; one of the two is given
    - patient: the column with patients' keys; None if each record is a unit of its own
    - disjoint_from: datasets that share no patient with it, which is never inferred from content
    - cohort: the name of the units that arrived last; a person changes it when new patients are
      added
    - consent: the column or the list by which a patient's consent is checked; None: consent is not
      checked"""

    path: Place | None = None
    url: Url | None = None
    patient: str | None = None
    disjoint_from: tuple[Name, ...] = ()
    cohort: Name = "first"
    consent: ConsentTable | None = None

    @model_validator(mode="after")
    def _check_place(self) -> RegisteredData:
        if (self.path is None) == (self.url is None):
            raise ValueError("path: name a file or folder, or a url, and not both")
        return self

    def anchored(self, folder: Path) -> RegisteredData:
        """Return a copy in which every path is absolute, also the path of a database; relative
        paths are taken from `folder`."""
        url = anchor_url(self.url, folder) if self.url else None
        return super().anchored(folder).model_copy(update={"url": url})

    def is_place_of(self, data: SiteData) -> bool:
        """Return whether `data` is at this place: the same file or folder, or the same database,
        even if the two are spelled differently."""
        if self.url and data.url:
            return databases_of(self.url) == databases_of(data.url)
        if self.url or data.url:
            return False
        assert self.path is not None
        if self.path.exists() and data.path.exists():
            return os.path.samefile(self.path, data.path)
        return self.path.resolve() == data.path.resolve()


class MembershipTable(Table):
    """A membership in a consortium, and its share of the hospital's ceilings.

    - site: the path of its site.toml
    - max_epsilon, max_fallback_epsilon, max_rounds: its share of each ceiling; None: all of it
    - earlier: whether this membership owns the charges that were made before several memberships
      shared the ledger"""

    site: Place
    max_epsilon: Positive | None = None
    max_fallback_epsilon: Positive | None = None
    max_rounds: Number | None = None
    earlier: bool = False


class Hospital(Table):
    """The settings of a hospital's home. Guarantee: they are never sent.

    A dataset or a membership that is not listed here is refused."""

    hospital: HospitalTable
    policy: CeilingTable = CeilingTable()
    datasets: dict[Name, RegisteredData]
    memberships: dict[Name, MembershipTable] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_combination(self) -> Hospital:
        if not fits(self.policy.max_delta, self.hospital.declared_size):
            raise ValueError(
                f"policy.max_delta = {self.policy.max_delta}: twice this value must be below 1 / "
                "hospital.declared_size; a larger δ would allow a mechanism to release a record"
            )
        if OFFICER in self.memberships:
            raise ValueError(f"memberships.{OFFICER}: is reserved for withdrawals")
        if sum(membership.earlier for membership in self.memberships.values()) > 1:
            raise ValueError("memberships: only one of them may have earlier = true")
        for name, data in self.datasets.items():
            if unknown := set(data.disjoint_from) - set(self.datasets):
                raise ValueError(f"datasets.{name}.disjoint_from: {min(unknown)} is no dataset")
        return self

    def anchored(self, folder: Path) -> Hospital:
        """Return a copy in which every path is absolute; relative paths are taken from `folder`."""
        tables = {
            name: {key: table.anchored(folder) for key, table in getattr(self, name).items()}
            for name in ("datasets", "memberships")
        }
        return self.model_copy(update=tables)


def share_in(
    site: Site, hospital: Hospital, site_file: Path, keys_may_differ: bool = False
) -> Site:
    """Return the site as a membership of the hospital: its policy with the hospital's ceilings and
    the membership's share of them, its datasets with what hospital.toml declares about them.

    - site: the settings of site.toml alone; they must have a table [hospital]
    - hospital: the settings of hospital.toml in the home which that table names
    - site_file: the path of site.toml, or the path that a draft of it will have; hospital.toml must
      name it for the membership
    - keys_may_differ: whether another membership may read patients' keys in another way, as for an
      officer's commands, which train nothing

    Errors: ConfigError if hospital.toml does not list the membership or a dataset, or names another
    site file for the membership; if the site file contradicts it; or, unless `keys_may_differ`, if
    another membership reads patients' keys of a dataset in another way."""
    assert site.hospital is not None
    name, ceilings = site.hospital.membership, hospital.policy
    where = site.hospital.home / FILE
    if (membership := hospital.memberships.get(name)) is None:
        raise ConfigError(
            f"{where}: has no membership {name!r}",
            "one of " + (", ".join(sorted(hospital.memberships)) or "none so far"),
            "`fedtune memberships` adds one",
        )
    if membership.site.resolve() != site_file.resolve():
        raise ConfigError(
            f"{site_file}: is not the site file of membership {name!r}",
            f"{membership.site}, which {where} names",
            "correct the path there, if the file was moved",
        )
    if site.site.declared_size > hospital.hospital.declared_size:
        raise ConfigError(
            f"site.declared_size = {site.site.declared_size}: more than the hospital declares",
            f"at most hospital.declared_size = {hospital.hospital.declared_size}, in {where}",
            "correct one of the two: beside the ledger, disk space is reserved for as many "
            "units as the hospital declares",
        )
    share = ShareTable(
        membership=name,
        max_epsilon=ceilings.max_epsilon,
        max_fallback_epsilon=ceilings.max_fallback_epsilon,
        max_delta=ceilings.max_delta,
        max_rounds=ceilings.max_rounds,
        earlier=membership.earlier,
        declared_size=hospital.hospital.declared_size,
        memberships=tuple(sorted(hospital.memberships)),
        disjoint_from={name: data.disjoint_from for name, data in hospital.datasets.items()},
        patients={name: shorten_column(data.patient) for name, data in hospital.datasets.items()},
    )
    own = site.policy
    policy = own.model_copy(
        update={
            "max_epsilon": min(own.max_epsilon, membership.max_epsilon or ceilings.max_epsilon),
            "max_fallback_epsilon": min(
                own.max_fallback_epsilon,
                membership.max_fallback_epsilon or ceilings.max_fallback_epsilon,
            ),
            "max_delta": min(own.max_delta, ceilings.max_delta),
            "max_rounds": min(own.max_rounds, membership.max_rounds or ceilings.max_rounds),
            "hospital": share,
        }
    )
    data = _registered(site.data, hospital, where)
    evaluation = site.evaluation and _registered(site.evaluation, hospital, where)
    if not keys_may_differ:
        _check_read_alike(site, hospital, site_file)
    return site.model_copy(update={"policy": policy, "data": data, "evaluation": evaluation})


def _registered(data: Data, hospital: Hospital, where: Path) -> Data:
    """Return a dataset of the site file, with the settings that the hospital declares for it.
    where: the path of hospital.toml, for an error's text. Errors: ConfigError if the dataset is not
    registered, or the two files contradict each other."""
    if (registered := hospital.datasets.get(data.name)) is None:
        raise ConfigError(
            f"{where}: has no dataset {data.name!r}",
            "one of " + ", ".join(sorted(hospital.datasets)),
            "register it there, or give the site's table the name under which it is registered",
        )
    if data.declared:
        raise ConfigError(
            f"{data.name}: data that is declared {data.declared} is not a hospital's dataset",
            "private records",
            "if the records are private, remove `declared`; if no record was ever private, name "
            "the data in a site file without the table [hospital], and store it in another place",
        )
    if not registered.is_place_of(data):
        raise ConfigError(
            f"{data.where}: is not where the hospital's dataset {data.name!r} is registered",
            f"the place in {where}",
            "register these records under another name in hospital.toml, or correct the path",
        )
    names = [name for name, other in hospital.datasets.items() if other.is_place_of(data)]
    if len(names) > 1:
        raise ConfigError(
            f"{where}: {' and '.join(map(repr, names))} are the same place",
            "one name for each place, under which all that its patients paid is counted",
            "take one of the two out",
        )
    if data.columns.patient != registered.patient:
        raise ConfigError(
            f"columns.patient of {data.name!r}: is {data.columns.patient!r}, and the hospital's is "
            f"{registered.patient!r}",
            f"one column of patients for all memberships: `patient` of the dataset in {where}",
            "correct one of the two files; without a column, each record is a unit of its own",
        )
    declared = {name: getattr(registered, name) for name in ("disjoint_from", "cohort", "consent")}
    for name, value in declared.items():
        if name in data.model_fields_set and getattr(data, name) != value:
            raise ConfigError(
                f"{name} of {data.name!r}: differs from what the hospital declares",
                f"what {where} says, for all memberships",
                "remove it from the site file",
            )
    return data.model_copy(update=declared)


def _check_read_alike(site: Site, hospital: Hospital, site_file: Path) -> None:
    """Check that all memberships read the patients' keys of a dataset in the same way. A key that
    is read in another way is another patient to the ledger, so a withdrawal would hold in one
    membership only. A site file that cannot be read is not compared, since such a site cannot take
    part. Errors: ConfigError."""
    for membership in hospital.memberships.values():
        if membership.site.resolve() == site_file.resolve():
            continue
        for table, other in product(_tables(site), _tables_in(membership.site)):
            ours, theirs = _read_by(table), _read_by(other)
            if table.name == other.name and ours != theirs:
                differs = [key for key in ours if ours[key] != theirs[key]]
                raise ConfigError(
                    f"{site_file} and {membership.site} read {table.name!r} differently: "
                    + ", ".join(f"{key} {ours[key]!r} and {theirs[key]!r}" for key in differs),
                    "one way for all memberships, so that a patient's key is the same in each",
                    "correct `source` or `options` of [data] in one of the two",
                )


def _tables(site: Site) -> list[SiteData]:
    return [table for table in (site.data, site.evaluation) if table]


def _tables_in(site_file: Path) -> list[SiteData]:
    from fedtune.core.config.load import load_site

    try:
        return _tables(load_site(site_file, alone=True))
    except FedtuneError:
        return []


def _read_by(data: SiteData) -> dict[str, str]:
    """Return the settings by which a patient's key is read from a row, by name: the kind of source,
    the text encoding and the delimiter. The other settings do not matter to the key: a converter
    gets rows whose patient is known already, and table, query and filter only choose rows."""
    encoding = str(data.options.get("encoding", "utf-8"))
    with suppress(LookupError):
        encoding = codecs.lookup(encoding).name  # one spelling for each encoding
    return {
        "source": FHIR if data.source == FHIR else "rows",  # others read the cells unchanged
        "encoding": encoding,
        "delimiter": str(data.options.get("delimiter", ",")),
    }
