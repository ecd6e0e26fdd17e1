"""Check and sign declarations that a site's data is public or generated, before it joins; such
data pays from a ledger of the run."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.data.identity import identities
from fedtune.core.errors import PolicyRefused
from fedtune.core.ledger import declared as ledger_entries
from fedtune.core.ledger.files import DATABASE, RUNS, outbox_prefix
from fedtune.core.ledger.ledger import Ledger


def declare(site: Site, sign: bool = True) -> None:
    """Check a site's declared datasets and its private ones; see `sign_declarations` and
    `check_private`. Call it before the site connects: its result depends on records, and stays
    at the site."""
    sign_declarations(site, sign)
    check_private(site)


def sign_declarations(site: Site, sign: bool = True) -> None:
    """Check a site's declared datasets against its lifetime ledger, and sign the declarations.

    sign: False to check only. Errors: PolicyRefused if a dataset was ever charged as private;
    DataError if it cannot be read; LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        if data.declared:
            ledger = Ledger(site.home)
            ledger_entries.declare(ledger, data.name, data.declared, identities(data), sign)


def check_private(site: Site) -> None:
    """Check that none of a site's private data was ever declared; no record is read if the site
    never declared any.

    Errors: PolicyRefused if some was; DataError if it cannot be read; LedgerError."""
    for data in filter(None, (site.data, site.evaluation)):
        if not data.declared and (site.home / DATABASE).exists():
            ledger = Ledger(site.home)
            if ledger_entries.read_declarations(ledger):
                known = identities(data, patients=False)
                ledger_entries.check_private(ledger, data.name, known)


def paid_by_run(site: Site, ledger: Path) -> Site:
    """Copy a site of declared data so that it pays from the run's ledger in the folder `ledger`."""
    table = site.site.model_copy(update={"ledger": ledger.absolute()})
    return site.model_copy(update={"site": table})


def run_ledger(site: Site, digest: str) -> Path:
    """Return the folder in which a site of a consortium keeps the ledger of the run of a plan."""
    return site.site.state / RUNS / outbox_prefix(digest)


def permit_declared(site: Site, home: Ledger) -> None:
    """Check that declared data may take part: it was declared in `home` before the site joined, and
    in a consortium its policy allows it. The result never depends on a record.

    site: as `as_stated` returns it. Errors: PolicyRefused."""
    for data in filter(None, (site.data, site.evaluation)):
        if data.declared:
            if site.site.ledger is None:
                allow_declared(site)
            ledger_entries.check_declared(home, data.name, data.declared)


def as_stated(current: Site, loaded: Site) -> Site:
    """Return the site as it was when it joined, with the policy that its file has now.

    current: the site file as it is now; loaded: as it was when the site joined.
    A policy that was changed applies from the next order, and so does what a hospital declares
    disjoint. All else counts when the site is started
    again: the coordinator was told the declared size and the LoRA rank, from which q, σ and the
    rule for δ follow, the disk space beside the ledger was reserved for that size, and the records
    in memory were read by these tables, the held-out ones included.
    Errors: PolicyRefused if the file says by now what cannot wait until then: that another ledger
    pays, that data is not declared, or that a query or a view selects the records, of which the
    coordinator was not informed; or if the new policy does not fit the declared size of the
    start."""
    if current.hospital != loaded.hospital:  # whose ceilings the new policy would be under
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
    # Whether the file itself names the ledger of a run: in a consortium `begin_run` chooses it.
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
    """Refuse declared data in a consortium unless the site's policy allows it.

    Errors: PolicyRefused."""
    if site.data.declared and not site.policy.allow_declared_data:
        raise PolicyRefused(
            f"data.declared = {site.data.declared!r} and policy.allow_declared_data is not set",
            "policy.allow_declared_data = true, to take part with data that holds no patient",
            "remove `declared` from site.toml to train on private records; to "
            "rehearse with declared data on this machine, use `fedtune simulate`",
        )
