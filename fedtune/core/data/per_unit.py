"""Convert one unit's rows to examples. Every step of the conversion passes through `per_unit`.

fedtune's own code, which is small for each format, splits the rows of a file or table into units.
What then happens to a unit's rows (a plug-in's conversion, records, scans, templates, tokens) is a
function of that unit's rows and of public settings, and only `per_unit` calls it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from fedtune.core.errors import ConfigError, is_fault

log = logging.getLogger("fedtune.data")
R = TypeVar("R")
V = TypeVar("V")


def per_unit(
    convert: Callable[[list[R]], list[V]], kinds: type | tuple[type, ...]
) -> Callable[[Sequence[R]], list[V] | None]:
    """Wrap a conversion so that it gets the rows of one unit and nothing else. Return a function
    that takes one unit's rows and returns `convert`'s list, or None if the unit is left out.

    - convert: a function of one unit's rows, a list, that returns a list and holds only public
      settings. It is a frozen dataclass or a function of this release, or a Conversion, which runs
      a plug-in's conversion in a separate process
    - kinds: the types that the values in `convert`'s list may have

    Guarantee: the result for a unit depends only on its rows and public settings. `convert` learns
    neither whose rows they are, nor which unit it is, nor how many units there are. If it fails, or
    returns values of other types, this unit alone is left out.
    | what happens | what the returned function does                                               |
    |--------------|-------------------------------------------------------------------------------|
    | `convert` raises, a library panics, or the result has other types | returns None             |
    | MemoryError  | raises it, since memory that other units take decides when it occurs          |
    | ConfigError  | raises it, since a package is missing, on which no row has an influence       |
    """

    def of_unit(rows: Sequence[R]) -> list[V] | None:
        try:
            found = convert(list(rows))
        except (ConfigError, MemoryError):
            raise
        except BaseException as error:  # of a library; it may quote the record
            if not is_fault(error):
                raise
            log.warning("a unit cannot be converted (%s)", type(error).__name__)
            return None
        if not isinstance(found, list) or not all(isinstance(value, kinds) for value in found):
            return None
        return found

    return of_unit
