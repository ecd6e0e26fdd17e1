"""Data sources read records from files and databases. Each is a module with a frozen dataclass,
whose fields are the keys of [data.options] in site.toml.

A file's suffix decides which source reads it, unless site.toml names one (data.source), which may
then be given options. All sources are part of this release, since they see the rows of many units.
Another distribution can provide a converter, which sees one unit's rows (data/converters)."""

from __future__ import annotations

from fedtune.core.data.sources._interface import Collection, Names, Row, Source
from fedtune.core.registry import Group

__all__ = ["SOURCES", "Collection", "Names", "Row", "Source", "by_suffix"]

SOURCES = Group("sources", "data.source", __name__, Source, foreign=False)  # type: ignore[type-abstract]


def by_suffix() -> dict[str, Source]:
    """Return this release's sources as a dict: file suffix -> the source that reads such files."""
    kinds = [SOURCES.load(name) for name in SOURCES.release()]
    return {suffix: kind() for kind in kinds for suffix in kind.suffixes}
