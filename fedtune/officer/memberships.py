"""List the memberships of a hospital's home, make one, and end one.

A home is a folder with hospital.toml and one ledger; each membership has a site.toml and a state
folder of its own, and pays from that ledger (core/config/hospital.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_in
from pathlib import Path
from typing import Any

from fedtune.core.config import PolicyTable, Site, load_site
from fedtune.core.config.hospital import FILE, CeilingTable, Hospital, RegisteredData
from fedtune.core.config.load import load_hospital
from fedtune.core.config.patient_columns import shorten_column
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, InputError
from fedtune.core.files import locks
from fedtune.core.files.room import ORDERS, ROOM
from fedtune.core.files.writing import create, replace, sync_folder
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.entries import EVERY
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import (
    DatasetBudget,
    MembershipLine,
    find_heaviest_budget,
    membership_lines,
    share_of,
)
from fedtune.core.processes import alone
from fedtune.core.vault.process import vault_of
from fedtune.core.vault.studies import under_way
from fedtune.flower.membership import keys_folder, load_answer
from fedtune.homes.opening import find_ledger
from fedtune.observe.status import LOCK, held
from fedtune.officer import purge
from fedtune.officer.freeze import check_not_frozen
from fedtune.officer.hospital_file import (
    keep_copy,
    load_hospital_text,
    without_table,
    write_hospital,
    write_membership,
)

EDIT_LOCK = "hospital.lock"  # file in a home; held by the process that edits hospital.toml
LOCKS = (LOCK, "flower/lock", "ranks/lock")  # files in a state folder; held by a client or a vault


@dataclass(frozen=True)
class Membership:
    """A membership as `fedtune memberships` shows it.

    - consortium: {address, fingerprint} of the coordinator whose answer is stored; None if none is
    - share: dataset → the ε that the membership spent, and the most that it may spend
    - studies: digest → name of each study that is under way
    - runs: whether its client or vault runs now
    - problem: why its site file cannot be used; "" if it can"""

    name: str
    site_file: Path
    max_epsilon: float
    max_fallback_epsilon: float
    site: str = ""
    consortium: dict[str, str] | None = None
    share: dict[str, DatasetBudget] = field(default_factory=dict)
    studies: dict[str, str] = field(default_factory=dict)
    runs: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Listed:
    """A home's memberships, and the ε that each of them and all together spent.

    - totals: for each registered dataset, what was spent of it and what the hospital's ceilings
      allow
    - who: dataset → the ε that each membership spent; memberships that have ended are included"""

    home: Path
    hospital: Hospital
    memberships: list[Membership]
    totals: list[DatasetBudget]
    who: dict[str, list[MembershipLine]]

    def facts(self) -> dict[str, Any]:
        """Return the home, its memberships and the ε that they spent as a dict of plain values,
        from which JSON can be written."""
        return {
            "home": self.home,
            "hospital": self.hospital.hospital.name,
            "memberships": [asdict(each) for each in self.memberships],
            "datasets": [
                asdict(total)
                | {"remaining": total.remaining}
                | {"memberships": [asdict(line) for line in self.who[total.dataset]]}
                for total in self.totals
            ],
        }


def list_memberships(home: Path) -> Listed:
    """List a home's memberships and totals; no ledger is made. Errors: ConfigError; LedgerError."""
    home = home.resolve()
    hospital = load_hospital(home)
    ledger = find_ledger(home)
    ceilings = hospital.policy
    policy = PolicyTable(
        max_epsilon=ceilings.max_epsilon,
        max_fallback_epsilon=ceilings.max_fallback_epsilon,
        max_delta=ceilings.max_delta,
    )
    totals, who = list[DatasetBudget](), dict[str, list[MembershipLine]]()
    unknown = _list_unknown(hospital, ledger) if ledger else {}
    for name in hospital.datasets:
        cohorts = ledger.cohorts(name) if ledger else []
        none_spent = DatasetBudget(name, 0.0, "", 0.0, policy.max_epsilon, policy.max_delta)
        total = find_heaviest_budget(name, cohorts, policy) if cohorts else none_spent
        totals.append(replace_in(total, known=not unknown.get(name)))
        who[name] = membership_lines(name, cohorts, policy, unknown.get(name, ()))
    listed = [_membership(name, hospital, ledger, unknown) for name in hospital.memberships]
    return Listed(home, hospital, listed, totals, who)


def _list_unknown(hospital: Hospital, ledger: Ledger) -> dict[str, set[int]]:
    """Return each registered dataset -> the charges against it whose ε is not known, each as the
    number of its entry in the ledger. The ε meant is that of one patient if hospital.toml names a
    column of patients for the dataset, else that of one record."""
    columns = {name: shorten_column(data.patient) for name, data in hospital.datasets.items()}
    return {
        name: {
            spent.seq
            for spent in ledger.spending(name, columns)
            if not spent.is_known_for("patient" if columns[name] else "record")
        }
        for name in hospital.datasets
    }


def _membership(
    name: str, hospital: Hospital, ledger: Ledger | None, unknown: Mapping[str, set[int]]
) -> Membership:
    """Describe the membership `name`.

    - hospital: the content of hospital.toml
    - ledger: the ledger of the hospital's home; None if there is none yet
    - unknown: the result of `_list_unknown`, {} without a ledger"""
    table, ceilings = hospital.memberships[name], hospital.policy
    most = table.max_epsilon or ceilings.max_epsilon
    fallback = table.max_fallback_epsilon or ceilings.max_fallback_epsilon
    try:
        site = site_of(table.site, name, keys_may_differ=True)
    except FedtuneError as error:
        return Membership(name, table.site, most, fallback, problem=str(error))
    consortium, problem = None, ""
    try:
        if answer := load_answer(keys_folder(site), site.site.name):
            consortium = {"address": answer.address, "fingerprint": answer.fingerprint}
    except FedtuneError as error:
        problem = str(error)
    share = {
        data.name: share_of(
            data.name, ledger.cohorts(data.name), site.policy, unknown.get(data.name, ())
        )
        for data in (site.data, site.evaluation)
        if data and ledger
    }
    return Membership(
        name=name,
        site_file=table.site,
        max_epsilon=site.policy.max_epsilon,
        max_fallback_epsilon=site.policy.max_fallback_epsilon,
        site=site.site.name,
        consortium=consortium,
        share=share,
        studies=under_way(site.site.state),
        runs=is_running(site.site.state),
        problem=problem,
    )


def site_of(
    path: Path, membership: str, at: Path | None = None, *, keys_may_differ: bool = False
) -> Site:
    """Load the site file of a membership.

    - path: the site file, or a draft of it
    - membership: the membership's name, which the file must state
    - at: for a draft, the path at which the file will lie; None if `path` is that path
    - keys_may_differ: whether to accept a site file by which patients' keys are read in another way
      than by another membership of the hospital

    Errors: ConfigError if it is another membership's file."""
    site = load_site(path, at=at, keys_may_differ=keys_may_differ)
    if site.policy.membership != membership:
        raise ConfigError(
            f"{path}: is not the site file of membership {membership!r}",
            f'membership = "{membership}" in its table [hospital]',
            f"correct this file, or the membership's entry in {FILE}",
        )
    return site


def is_running(state: Path) -> bool:
    """Return whether a process of `fedtune client` or `fedtune vault` works in this state folder
    now."""
    return any(held(state / name) for name in LOCKS)


@contextmanager
def still(home: Path, site: Site) -> Iterator[None]:
    """A context manager that keeps, while its block runs, every client and vault of the site, and
    of all memberships of `home`, from running. Errors: InfrastructureError if one runs; ConfigError
    if a membership's site file cannot be read, since nobody can then tell whether its client
    runs."""
    states = {site.site.state.resolve()}
    memberships = load_hospital(home).memberships if (home / FILE).exists() else {}
    for membership in memberships.values():
        if membership.site.exists():
            states.add(load_site(membership.site, alone=True).site.state.resolve())
    with ExitStack() as held:
        for name in memberships:  # by name: a site file may have moved since its vault started
            held.enter_context(vault_of(home, name))
        for state in sorted(state for state in states if state.is_dir()):
            held.enter_context(alone(state / "flower", "fedtune client"))
            held.enter_context(alone(state / "ranks", "the vault of a client"))
        yield


# ----------------------------------------------------------------------------------------- add


def make_home(home: Path, name: str, size: int, dataset: str, data: RegisteredData) -> Path:
    """Make a hospital's home with one registered dataset, and return its hospital.toml.

    - home: the folder, which is made if it does not exist
    - name: the hospital's name
    - size: the number of units of its largest dataset, as a person declares it; the ceilings' δ
      follows from it (`ceilings_for`)
    - dataset: the name under which the dataset is registered
    - data: the dataset's table, with an absolute path or a url

    Errors: ConfigError if there is a home already, or the size is too large for the ceilings' δ;
    InfrastructureError."""
    if (home / FILE).exists():
        raise ConfigError(f"{home / FILE} exists", "a folder that is no home yet")
    text = write_hospital(name, size, ceilings_for(size), {dataset: data})
    load_hospital_text(home.resolve().parent, text)  # before there is a home
    return create(home / FILE, text.encode(), private=True)


def ceilings_for(size: int) -> CeilingTable:
    """Return the ceilings of a new home for a hospital of this declared size. They are the
    defaults, but max_delta is lowered until 2 · max_delta · size < 1."""
    most = CeilingTable().max_delta
    while 2 * most * size >= 1:
        most /= 10
    return CeilingTable(max_delta=float(f"{most:.0e}"))


def add(
    home: Path, name: str, site: Path, site_text: str, max_epsilon: float | None = None
) -> list[Path]:
    """Enter a membership in hospital.toml and write its site file, 0600; return both files.

    - home: the folder of the hospital's home
    - name: the membership's name, which no other membership of this home ever had
    - site: the path at which its site file is written
    - site_text: the content of the site file
    - max_epsilon: its share of the hospital's ceiling; None allows the whole ceiling

    If the process is killed after it entered the membership, a second call with the same name and
    site path writes the site file. Errors: ConfigError if another membership has or had the name,
    the site file exists, or either file would not be valid."""
    home, site = home.resolve(), site.absolute()
    hospital = load_hospital(home)
    if site.exists():
        raise ConfigError(f"{site} exists", "a folder without this file", "choose another folder")
    there = hospital.memberships.get(name)
    if there is None or there.site.resolve() != site.resolve():
        check_new(home, hospital, name)
        append(home, write_membership(name, site, max_epsilon))
    draft = create(site, site_text.encode(), private=True)
    try:
        site_of(draft, name)
    except FedtuneError:
        draft.unlink()
        raise
    return [home / FILE, site]


def check_new(home: Path, hospital: Hospital, name: str) -> None:
    """Check that a new membership may have this name: no membership has it now, and no earlier
    membership of this name is in the home's ledger or audit log. The home takes no new membership
    while the first one, whose ledger became the hospital's, still pays from a ledger of its own,
    since its adoption is not complete: what either ledger is charged would be in only one of them.
    home: the folder of the hospital's home. hospital: the content of its hospital.toml. Errors:
    ConfigError."""
    for first, membership in hospital.memberships.items():
        if membership.earlier and _has_own_ledger(membership.site):
            raise ConfigError(
                f"{membership.site}: has no table [hospital], so that membership {first!r}, whose "
                f"ledger {home} has, still pays from its own",
                "a home whose first adoption is complete",
                f"`fedtune memberships {home} --adopt {membership.site} --name {first}` completes "
                "it; then run this command again",
            )
    if name in (EVERY, "") or name in hospital.memberships:
        raise ConfigError(f"{home / FILE}: has a membership {name!r} already", "another name")
    if name in earlier_names(home):
        raise ConfigError(
            f"a membership {name!r} has paid from the ledger in {home} and has ended, or a person "
            "signed or decided something for it",
            "a name that no membership ever had",
            "choose another name: what was paid and signed under this one stays with it",
        )


def _has_own_ledger(site_file: Path) -> bool:
    """Return whether a site file can be read and names no hospital's home."""
    try:
        return load_site(site_file, alone=True).hospital is None
    except FedtuneError:
        return False


def earlier_names(home: Path) -> set[str]:
    """Return the names of all memberships, ended ones too, that occur in a home's ledger or audit
    log."""
    if (book := find_ledger(home)) is None:
        return set()
    acts = audit_log.verify(home, book.key.public).entries
    return book.memberships | {str(act["facts"].get("membership", "")) for act in acts}


def append(home: Path, table: str) -> None:
    """Append a table to hospital.toml, after a check that the new text can be read. Errors:
    ConfigError."""
    path = home / FILE
    with locks.hold(home / EDIT_LOCK):  # if two processes append at once, both tables stay
        text = path.read_text(encoding="utf-8")
        text += table if text.endswith("\n") else f"\n{table}"
        load_hospital_text(home, text)
        replace(path, text.encode(), private=True)


# ----------------------------------------------------------------------------------------- end


@dataclass(frozen=True)
class Ending:
    """What the end of a membership would delete, and what it would keep.

    - home, name: the hospital's home and the membership
    - site: the membership's site; None if its site file cannot be used
    - delete: kind → the files of this kind: those of the state folder, those of the membership's
      studies, and the network keys
    - paid: dataset → what the membership spent; this stays spent
    - anyway: why `end` refuses without `anyway`; "" if it does not refuse"""

    home: Path
    name: str
    site: Site | None
    delete: dict[str, list[Path]]
    paid: dict[str, MembershipLine]
    anyway: str = ""


def list_ending(home: Path, name: str) -> Ending:
    """List the files that `end` would delete, and what the membership spent, which stays spent.
    Errors: ConfigError if the home has no such membership; InfrastructureError if its client runs.
    """
    listed = list_memberships(home)
    found = [each for each in listed.memberships if each.name == name]
    if not found:
        raise ConfigError(
            f"{listed.home / FILE}: has no membership {name!r}",
            "one of " + (", ".join(listed.hospital.memberships) or "none so far"),
        )
    (one,) = found
    if one.runs:
        raise InfrastructureError(
            f"the client of membership {name!r} runs", "a client that has ended", "stop it first"
        )
    paid = {
        dataset: line
        for dataset, lines in listed.who.items()
        for line in lines
        if line.membership == name
    }
    site, delete, anyway = None, dict[str, list[Path]](), ""
    with suppress(FedtuneError):
        site = site_of(one.site_file, name, keys_may_differ=True)
    if site is None:
        anyway = f"its site file cannot be used, so that nothing is deleted: {one.problem}"
    elif one.studies:
        anyway = f"studies are under way: {', '.join(one.studies.values())}"
    if site is not None and site.site.state.is_dir():
        delete = purge.listing(site).deletable
        if keys := network_keys(site):
            delete["network keys, certificates and the coordinator's answer"] = keys
    return Ending(listed.home, name, site, delete, paid, anyway)


def network_keys(site: Site) -> list[Path]:
    """List the paths of the files with a site's network keys, its certificates and the
    coordinator's answer, and of earlier versions of these files."""
    folders = _key_folders(site)
    return sorted(path for each in folders for path in each.rglob("*") if not path.is_dir())


def _key_folders(site: Site) -> list[Path]:
    keys = keys_folder(site)
    return [keys, *sorted(keys.parent.glob(f"{keys.name}.old-*"))]


def end(ending: Ending, *, anyway: bool = False) -> Path:
    """End a membership; return the path of the copy of hospital.toml that is kept. ending: the
    result of `list_ending`. anyway: whether to end the membership in spite of `ending.anyway`.

    The membership's charges, releases, receipts and acts stay in the hospital's ledger and audit
    log for good, and its own signing key stays too. Its table in hospital.toml is removed last, so
    that a call that was killed can be repeated; after that, the site file is refused. Other changes
    of hospital.toml that are made meanwhile stay.
    Errors:
    - InputError: studies are under way or the site file cannot be used, and `anyway` is false
    - Refused: the ledger is frozen
    - InfrastructureError: the membership's client runs"""
    if ending.anyway and not anyway:
        raise InputError(
            ending.anyway,
            todo="wait until its studies have ended, or correct its site file; or give --anyway",
        )
    home, name, site = ending.home, ending.name, ending.site
    check_not_frozen(home, "deleted")
    _without(home, name)  # before anything is deleted
    if book := find_ledger(home):
        files = sum(map(len, ending.delete.values()))
        AuditLog(home, book.key).add("leave", "--anyway" if anyway else "--end", membership=name,
                                     files=files)  # fmt: skip
    if site is not None and site.site.state.is_dir():
        purge.purge(purge.listing(site))
        delete_keys(site)
    with locks.hold(home / EDIT_LOCK):
        text = _without(home, name)
        copy = keep_copy(home / FILE)
        replace(home / FILE, text.encode(), private=True)
    for path in (home / f"{ROOM}-{name}", home / ORDERS.replace(".", f"-{name}.")):
        path.unlink(missing_ok=True)
    return copy


def _without(home: Path, name: str) -> str:
    """Return the text of the hospital.toml in `home`, as it is on disk now, without the table of
    the membership `name`. Errors: ConfigError."""
    before = (home / FILE).read_text(encoding="utf-8")
    text = without_table(before, "memberships", name)
    there, left = (set(load_hospital_text(home, one).memberships) for one in (before, text))
    if left != there - {name}:
        raise ConfigError(
            f"{home / FILE}: fedtune cannot take out [memberships.{name}] and leave all other "
            "memberships as they are",
            todo="take its lines out in an editor",
        )
    return text


def delete_keys(site: Site) -> None:
    try:
        for path in network_keys(site):
            path.unlink(missing_ok=True)
        for folder in _key_folders(site):
            for root, _, _ in os.walk(folder, topdown=False):
                os.rmdir(root)
        sync_folder(site.site.state)
    except OSError as error:
        raise InfrastructureError(
            f"{error.filename}: cannot be deleted ({error.strerror})",
            todo="fix the permissions, then run the command again",
        ) from None
