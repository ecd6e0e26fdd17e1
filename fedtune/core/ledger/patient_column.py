"""Check that a dataset whose patients a column once told apart still names such a column.

A withdrawal, and membership in a disjoint dataset, are recognised by the patient's key. Without the
column nobody is recognised any more, and whoever withdrew would train again.
Guarantee: the result follows from the site's settings, from what was declared and from what was
charged, never from a record, nor from whether anybody withdrew."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from fedtune.core.config.patient_columns import disjoint_datasets, patient_columns
from fedtune.core.errors import PolicyRefused

if TYPE_CHECKING:
    from fedtune.core.config.site import Site
    from fedtune.core.ledger.ledger import Ledger


def check_column_stays(
    ledger: Ledger | None, site: Site, dataset: str, unit: str, *, at_site: bool = False
) -> None:
    """Check that a dataset that has or had a column of patients is not read as single records: such
    a dataset is read per patient for good. This also holds for `dataset` if another dataset has or
    had such a column, unless the site's files declare the two disjoint. The site's files are asked,
    not the ledger, which gets what they declare only at the next charge.

    A column of another dataset counts as soon as the site's files name it, even if no study has
    read that dataset yet. Otherwise the first plan for that dataset would end studies on `dataset`,
    and their coordinators would see when that plan came.

    - ledger: the ledger to which the dataset's rounds are charged; None if there is none yet
    - site: the settings of the site, with those of hospital.toml if it is a membership
    - dataset: the dataset's name
    - unit: "patient" or "record": whose records a study or a command reads together. With
      "patient", some column is named, and nothing is checked here
    - at_site: whether the error is shown to a person at the site and to no coordinator. Only then
      does the error name the datasets and their columns, since these are the site's own settings

    Errors: PolicyRefused. No person's acceptance (`Ledger.accept`) prevents it."""
    if unit == "patient":
        return
    if not (had := find_columns(ledger, site, dataset)):
        return
    which = ", ".join(
        f"{' and '.join(map(repr, columns)) or 'one'} of dataset {name!r}"
        for name, columns in had.items()
    )
    raise PolicyRefused(
        "no patient column is named, and this site has or had one"
        + (f" ({which})" if at_site else "")
        + " for records that may be of the same patients; without it, patients who withdrew are "
        "not recognised",
        "the column that tells these patients apart",
        "a person at the site names the column again (columns.patient). If none of those patients "
        "is in this dataset, the person instead gives this dataset another name, and lists the "
        "other dataset in its disjoint_from",
    )


def describe_withdrawn_before(
    ledger: Ledger, columns: Mapping[str, str], units: Collection[str] | None = None
) -> str:
    """Say that patients withdrew before a present column told patients apart: by that column they
    are recognised only if its keys are withdrawn, too. The text is for a person at the site alone.
    Return "" if there are none, or none is known: an earlier release and a restore enter no column.

    - ledger: the ledger with the withdrawals
    - columns: the column of patients of each dataset, as the site's files are now; "" for none
    - units: the hashes of the units that are looked at; None: all that withdrew"""
    now = {column for column in columns.values() if column}
    by = ledger.withdrawn_by
    others = [by[unit] for unit in (by if units is None else units) if by[unit]]
    others = [then for then in others if not now <= then]
    if not others:
        return ""
    new = ", ".join(sorted(map(repr, now - frozenset.intersection(*others))))
    return (
        f"{len(others)} of {len(by)} who withdrew did so before the column {new} told patients "
        "apart, and their records are left out only where that column has the same keys. If this "
        "was not done since, repeat `fedtune withdraw` with the keys that these patients have in it"
    )


def find_columns(ledger: Ledger | None, site: Site, dataset: str) -> dict[str, list[str]]:
    """Return the columns of patients that `dataset`, and each dataset which may have patients in
    common with it, has or ever had: dataset's name -> its columns, oldest first; [] if they are not
    known. The site's files say which datasets are disjoint from it. ledger, site: as for
    `check_column_stays`."""
    had = ledger.patient_columns if ledger else {}
    for name, column in patient_columns(site).items():
        if column:
            had.setdefault(name, [column])
    apart = disjoint_datasets(site)
    return {
        name: columns
        for name, columns in had.items()
        if name == dataset or not (name in apart.get(dataset, ()) or dataset in apart.get(name, ()))
    }
