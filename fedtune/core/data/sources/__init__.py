"""Data sources read files of records: one module each, a frozen dataclass with [data.options] as
fields.

A file's suffix decides which source reads it. A site may name one (data.source in site.toml), to
give it options. All are part of this release, since they see the rows of many units. Another
distribution can provide a converter, which sees one unit's rows (data/converters)."""

from __future__ import annotations

from fedtune.core.data.sources._interface import Collection, Names, Row, Source
from fedtune.core.registry import Group

__all__ = ["SOURCES", "Collection", "Names", "Row", "Source", "by_suffix"]

SOURCES = Group("sources", "data.source", __name__, Source, foreign=False)  # type: ignore[type-abstract]


def by_suffix() -> dict[str, Source]:
    """Map each file suffix to this release's source."""
    kinds = [SOURCES.load(name) for name in SOURCES.release()]
    return {suffix: kind() for kind in kinds for suffix in kind.suffixes}
