"""The names of the columns that tell a site's patients apart, as the ledger remembers them, and the
datasets that share no patient.

A charge per patient counts all rows with one value in that column as one patient. If another column
tells patients apart later, a person at the site decides whether the earlier charges still say what
a patient spent."""

from __future__ import annotations

import hashlib

from fedtune.core.config.site import Site, SiteData

LONGEST = 64  # bytes of a name; disk space for an entry of the ledger is reserved by it


def patient_column(data: SiteData) -> str:
    """Return the name of the column that tells the patients of `data` apart; "" if each record is a
    unit of its own."""
    return shorten_column(data.columns.patient)


def patient_columns(site: Site) -> dict[str, str]:
    """Return each dataset's column of patients, by the dataset's name: of the datasets in the
    site's file and, for a membership of a hospital, of all those in hospital.toml, since every
    membership declares all of them. If a column in hospital.toml was changed, a membership that has
    read its records by the old column is refused until it is started again."""
    tables = [table for table in (site.data, site.evaluation) if table]
    registered = site.policy.hospital.patients if site.policy.hospital else {}
    return {table.name: patient_column(table) for table in tables} | registered


def disjoint_datasets(site: Site) -> dict[str, tuple[str, ...]]:
    """Return each dataset's name -> the datasets from which it is declared disjoint, in the site's
    file or, in a hospital's home, in hospital.toml. A dataset that they do not name is declared
    disjoint from none."""
    if site.policy.hospital:
        return dict(site.policy.hospital.disjoint_from)
    tables = [table for table in (site.data, site.evaluation) if table]
    return {table.name: table.disjoint_from for table in tables}


def shorten_column(column: str | None) -> str:
    """Return a column's name, or its hash if the name takes more than LONGEST bytes or has a
    character that does not print; "" for None."""
    name = column or ""
    if len(name.encode()) <= LONGEST and name.isprintable():
        return name
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"[:LONGEST]
