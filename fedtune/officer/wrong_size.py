"""Tell a person at a site, on the screen, that site.declared_size is far from the true number of
units in the site's records.

Guarantee: the text is shown on this screen alone, and is neither logged nor sent. It has no effect
but through what the person decides."""

from __future__ import annotations

from typing import Literal

from fedtune.core.config import Site
from fedtune.core.data.declared_size import describe_wrong_size
from fedtune.core.data.records import read_records


def find_wrong_size(site: Site, unit: Literal["record", "patient"]) -> str:
    """Return a sentence if site.declared_size is far from the number of usable units in the site's
    data; "" if it is not far. Return "" too if counting would take long, because the records have
    images, recordings or clips, which would be decoded, or rows that a plug-in would convert. unit:
    what a plan protects.

    Errors: DataError if the records cannot be read, ConfigError if their source is not installed.
    """
    if site.data.convert or site.data.columns.media:
        return ""
    records, _ = read_records(site.data, unit=unit, strict=False)
    units = len({record.unit for record in records})
    return "".join(describe_wrong_size(units, site.site.declared_size, unit))
