"""Check and sign declarations that a site's data is public or generated.

This happens before the site joins a study. A run on such data is charged to a ledger of its own,
not to the lifetime ledger."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.data.identity import identities
from fedtune.core.errors import PolicyRefused
from fedtune.core.ledger import declared as ledger_entries
from fedtune.core.ledger.files import DATABASE, RUNS, outbox_prefix
from fedtune.core.ledger.ledger import Ledger


def declare(site: Site, sign: bool = True) -> None:
    """Check and sign a site's declarations that data is public or generated, then check that its
    other data was never declared so (`sign_declarations`, `check_private`). Call this before the
    site connects: an error follows from records, so the coordinator must not notice it. sign: False
    to check only. Errors: those of both functions."""
    sign_declarations(site, sign)
    check_private(site)


def sign_declarations(site: Site, sign: bool = True) -> None:
    """Check that a site's datasets which are declared public or generated were never charged as
    private in its lifetime ledger, and sign the declarations.

    sign: False to check only. Errors: PolicyRefused if a dataset was charged as private; DataError
    if it cannot be read; LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        if data.declared:
            ledger = Ledger(site.home)
            ledger_entries.declare(ledger, data.name, data.declared, identities(data), sign)


def check_private(site: Site) -> None:
    """Check that no record of a site's private data (data without `declared` in site.toml) was ever
    declared public or generated. If there is nothing that a person may have to accept, no record is
    read.

    Errors: PolicyRefused if one was, or may have been, declared; DataError if the data cannot be
    read; LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        if not data.declared and (site.home / DATABASE).exists():
            ledger = Ledger(site.home)
            if ledger_entries.list_not_accepted(ledger, data.name):
                known = identities(data, patients=False)
                ledger_entries.check_private(ledger, data.name, known)


def check_restored(site: Site) -> None:
    """Check that, if a restore of the ledger may have lost which records were declared public or
    generated, a person accepted this for each of the site's private datasets. No record is read.
    Errors: PolicyRefused; LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        if not data.declared and (site.home / DATABASE).exists():
            ledger_entries.check_private(Ledger(site.home), data.name, [])


def list_shared(site: Site, ledger: Ledger, dataset: str) -> list[str]:
    """List the datasets that were declared public or generated and that share records with the
    site's private `dataset`, unless a person has accepted this. If there is nothing that a person
    may have to accept, no record is read.

    ledger: the site's lifetime ledger. Errors: DataError if the dataset cannot be read;
    LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        is_private = data.name == dataset and not data.declared
        if is_private and ledger_entries.list_not_accepted(ledger, dataset):
            known = identities(data, patients=False)
            return sorted(ledger_entries.find_shared(ledger, dataset, known))
    return []


def paid_by_run(site: Site, ledger: Path) -> Site:
    """Return a copy of a site's settings whose rounds are charged to the ledger of one run. ledger:
    the folder of this ledger."""
    table = site.site.model_copy(update={"ledger": ledger.absolute()})
    return site.model_copy(update={"site": table})


def run_ledger(site: Site, digest: str) -> Path:
    """Return the folder of the ledger to which one run is charged, at a site that takes part in a
    consortium with data declared public or generated. digest: the digest of the run's plan."""
    return site.site.state / RUNS / outbox_prefix(digest)


def permit_declared(site: Site, home: Ledger) -> None:
    """Check that the site may train on its declared data: the lifetime ledger has the signed
    declaration and never charged a dataset of this name as private, and in a consortium the site's
    policy allows such data. (The declaration is signed when the site starts, before it joins.) The
    result never depends on a record.

    site: the site with the policy that its file has now (`with_new_policy`); home: its lifetime
    ledger. Errors: PolicyRefused."""
    for data in filter(None, (site.data, site.evaluation)):
        if data.declared:
            if site.site.ledger is None:
                allow_declared(site)
            ledger_entries.check_declared(home, data.name, data.declared)


def with_new_policy(current: Site, loaded: Site) -> Site:
    """Return the site as it was when it joined, but with the policy that its file has now.

    current: the site file as it is now; loaded: the site as it was when it joined, which a vault
    that is started later reads from the tables that were checked then (`core/config/checked.py`).

    A changed policy applies from the next order, and so does a hospital's changed list of disjoint
    datasets. Other changes apply only when the site is started again, for three reasons. The
    coordinator was told the declared size and the LoRA rank, from which q, σ and the rule for δ
    follow. The disk space beside the ledger was reserved for that size. And the records in memory,
    held-out ones included, were read by the tables of the earlier file.

    Errors: PolicyRefused if the file has a change that takes effect only after a restart but must
    not wait for it: another [hospital] table, so that another ledger would pay; another
    data.declared; another column of patients, by whose keys patients now withdraw, although the
    records were read by the earlier one; a query or a view that now selects the records, of which
    the coordinator was not informed; a policy that does not fit the declared size with which the
    site joined."""
    if current.hospital != loaded.hospital:  # its ceilings would limit the new policy
        raise PolicyRefused(
            "the table [hospital] was changed while this site takes part",
            "what it said when the site joined",
            "stop this site and start it again, so that the ledger it names pays",
        )
    for data, was in ((current.data, loaded.data), (current.evaluation, loaded.evaluation)):
        if getattr(data, "declared", None) != getattr(was, "declared", None):
            raise PolicyRefused(
                "data.declared was changed while this site takes part",
                todo="stop this site and start it again, so that it is checked anew",
            )
        if data and was and data.columns.patient != was.columns.patient:
            raise PolicyRefused(
                "columns.patient was changed while this site takes part",
                "the column that told the patients apart when the site joined",
                "stop this site and start it again, so that whoever withdraws is recognised",
            )
    if current.free_query and not loaded.free_query:
        raise PolicyRefused(
            "a query or a view selects this site's records, which it did not when the site joined",
            "what the site stated when it joined",
            "stop this site and start it again, so that the coordinator is informed",
        )
    if not current.policy.fits(loaded.site.declared_size):
        raise PolicyRefused(
            "policy.max_delta was changed together with site.declared_size, and does not fit the "
            "size with which this site takes part",
            "twice policy.max_delta below 1 / site.declared_size",
            "stop this site and start it again, so that the new size counts",
        )
    # Keep the ledger that the file names: None means a consortium, where `begin_run` chooses one.
    table = loaded.site.model_copy(update={"ledger": current.site.ledger})
    stated = loaded.model_copy(update={"site": table, "policy": current.policy})
    hospital = current.policy.hospital
    apart = {
        key: data.model_copy(update={"disjoint_from": hospital.disjoint_from[data.name]})
        for key, data in (("data", loaded.data), ("evaluation", loaded.evaluation))
        if hospital and data and data.name in hospital.disjoint_from
    }
    return stated.model_copy(update=apart)


def allow_declared(site: Site) -> None:
    """Check that the policy of a site in a consortium allows declared data, if the site's data is
    declared.

    Errors: PolicyRefused."""
    if site.data.declared and not site.policy.allow_declared_data:
        raise PolicyRefused(
            f"data.declared = {site.data.declared!r} and policy.allow_declared_data is not set",
            "policy.allow_declared_data = true, to take part with data that holds no patient",
            "remove `declared` from site.toml to train on private records; to "
            "rehearse with declared data on this machine, use `fedtune simulate`",
        )
