"""Converters are plug-ins that turn one unit's rows into other rows, which are then read in their
place.

This release contains no converter. site.toml names one from another installed distribution
(data.convert). The process that holds the records never imports it (../conversion.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from fedtune.core.data.sources._interface import Row
from fedtune.core.registry import Group

__all__ = ["CONVERTERS", "Converter", "Row"]


@dataclass(frozen=True)
class Converter(ABC):
    """The base class of converters, which turn one unit's rows into other rows: for example
    messages that hold several notes each into one row for each note.

    Subclasses are frozen dataclasses, whose fields are the keys of [data.convert.options]."""

    @abstractmethod
    def convert(self, rows: list[Row]) -> list[Row]:
        """Return the rows that are read in place of `rows`, the rows of one unit.

        - rows: if the unit is a patient, all rows of that patient, in the order of the file. If the
          unit is a record, one row, in whose place at most one row may be returned. Each row is a
          dict by column of texts, numbers, truth values, None, bytes, and lists and dicts of these

        The returned rows must hold no value of type bytes. A returned row may name an image or
        recording only if one of `rows` names it too.

        The method runs in a process without files, clock and network, which ends afterwards. If it
        raises, or exceeds the limits of core/data/conversion.py, the unit has no record, and no
        other unit is affected."""


CONVERTERS = Group("converters", "data.convert.name", __name__, Converter)  # type: ignore[type-abstract]
