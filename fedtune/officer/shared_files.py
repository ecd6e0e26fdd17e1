"""Find the images, recordings and clips that rows of several units name.

Such a file is part of each of these units' records. So ε bounds what one unit's rows change, but
not what the file changes, and it still trains through the other units' rows if its patient opts out
or withdraws (docs/multimodal.md).

Guarantee: what is found is returned to the caller, for the site's own screen. Nothing is logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fedtune.core.data.dataset import Failed
from fedtune.core.data.records import Record


@dataclass(frozen=True, repr=False)
class SharedFiles:
    """The files that rows of two or more units name. Files of the same content count as one.

    - unit: "patient" or "record"
    - count: the number of these files
    - rows: the rows that name one of them, each with a reason that says so"""

    unit: str
    count: int
    rows: list[Failed]

    def __str__(self) -> str:
        """A warning, for the site's own screen; "" if there is no such file."""
        if not self.count:
            return ""
        files = "1 file is" if self.count == 1 else f"{self.count:,} files are"
        return (
            f"{files} named by rows of two or more {self.unit}s. ε bounds what one {self.unit}'s "
            "rows change, not what such a file changes, and the file still trains through the "
            f"other rows if one {self.unit} is left out. Check whether these rows name the right "
            "file"
        )


def find_shared_files(records: Iterable[Record], unit: str) -> SharedFiles:
    """Find the files that rows of two or more units name.

    - records: the site's usable records, read with `unit`
    - unit: "patient" or "record" """
    naming = defaultdict[bytes, list[Record]](list)
    for record in records:
        if record.media is not None:
            naming[record.media.file].append(record)
    shared = [named for named in naming.values() if len({record.unit for record in named}) > 1]
    reason = f"names a file that another {unit}'s row names"
    places = (record.place for named in shared for record in named if record.place is not None)
    return SharedFiles(unit, len(shared), sorted(Failed(*place, reason) for place in places))
