"""Converters are plug-ins that turn one unit's rows into the rows that are read in their place.

This release contains no converter. site.toml names one of another distribution (data.convert). The
process that holds the records never imports it (../conversion.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedtune.core.data.sources._interface import Row
from fedtune.core.registry import Group

__all__ = ["CONVERTERS", "Converter", "Row"]


@dataclass(frozen=True)
class Converter(ABC):
    """Converts one unit's rows, such as messages that hold several notes each.

    Subclasses are frozen dataclasses whose fields are [data.convert.options] of site.toml."""

    @abstractmethod
    def convert(self, rows: list[Row]) -> list[Row]:
        """Return the rows that are read in place of `rows`.

        - rows: all rows of one unit, in the order of the file. If the unit is a patient, they are
          all rows of this patient. If it is the record, this is a single row, in whose place at
          most one row may be returned. Each row is a dict by column of texts, numbers, truth
          values, None, bytes, and lists and dicts of these

        Returns: rows without values of type bytes. A returned row may name an image or recording
        only if one of `rows` names it too.

        The method runs in a process without files, clock and network, which ends afterwards. If it
        raises, or exceeds the limits of core/data/conversion.py, the unit has no record, and no
        other unit is affected."""


CONVERTERS = Group("converters", "data.convert.name", __name__, Converter)  # type: ignore[type-abstract]
