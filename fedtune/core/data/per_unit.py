"""The one place through which everything passes that turns a unit's rows into what it trains on.

Rows of a file or table are split into units by our own code, which is small for each format. What
then becomes of a unit's rows (a plug-in's conversion, records, scans, templates, tokens) is a
function of that unit's rows and of public settings, called by `per_unit` alone."""

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
    """Make the function that converts one unit's rows, from one that is given nothing but them.

    convert: takes a list of one unit's rows, and holds public settings alone; a frozen dataclass or
    a function of this release, or a Conversion, which runs a plug-in's in a process of its own.
    kinds: of what it returns a list of. None: the unit is empty.

    Guarantee: what comes of a unit follows from its rows and public settings. `convert` learns
    neither whose rows they are, nor which unit it is, nor how many there are; whatever is wrong
    with what it does or returns concerns this unit alone.
    | an exception, a panic of a library's, other types | None                                    |
    | MemoryError | raised: others' rows decide when it comes, so that no unit is empty for it    |
    | ConfigError | raised: what a record needs is not installed, which no row decides            |
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
