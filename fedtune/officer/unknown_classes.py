"""Count the records of a site that a plan cannot use since it does not name their class.

Guarantee: the counts are for the site's own screen; none of them is logged or sent."""

from __future__ import annotations

from collections import Counter

from fedtune.core.config import Site, Study
from fedtune.core.data.records import read_records
from fedtune.core.errors import escape_controls

MOST = 12  # the most classes that are named; a column with more is likely to hold texts


def unknown_classes(study: Study, site: Site) -> str:
    """Return a sentence that says how many of a site's records are of a class that the plan `study`
    does not have, and names these classes; "" if there is no such record, or the plan has no
    classes.

    Errors: DataError if the records cannot be read, ConfigError if their source is not installed.
    """
    labels = {label.strip() for label in study.objective.labels}
    if not labels:
        return ""
    records, _ = read_records(site.data, unit=study.unit, strict=False)
    found = Counter(record.label.strip() for record in records)
    unknown = Counter({label: count for label, count in found.items() if label not in labels})
    if not unknown:
        return ""
    named = ", ".join(
        f"{escape_controls(label)[:40]} {n:,}" for label, n in unknown.most_common(MOST)
    )
    more = " …" if len(unknown) > MOST else ""
    are = "is" if unknown.total() == 1 else "are"
    return (
        f"{unknown.total():,} of this site's {found.total():,} records {are} of a class that the "
        f"plan has not, and will be left out: {named}{more}"
    )
