"""Data sources read records from files and databases: one module each, with a frozen dataclass
whose fields are [data.options].

A file's suffix decides which source reads it, unless site.toml names one (data.source), which may
then be given options. All sources are part of this release, since they see the rows of many units.
Another distribution can provide a converter, which sees one unit's rows (data/converters)."""

from __future__ import annotations

from fedtune.core.data.sources._interface import Collection, Names, Row, Source
from fedtune.core.registry import Group

__all__ = ["SOURCES", "Collection", "Names", "Row", "Source", "by_suffix"]

SOURCES = Group("sources", "data.source", __name__, Source, foreign=False)  # type: ignore[type-abstract]


def by_suffix() -> dict[str, Source]:
    """Return, for each file suffix, the source of this release that reads such files."""
    kinds = [SOURCES.load(name) for name in SOURCES.release()]
    return {suffix: kind() for kind in kinds for suffix in kind.suffixes}
