"""Data sources: one module each, a frozen dataclass whose fields are [data.options].

A file's suffix says which one reads it. A site may name one (data.source in its own site.toml), to
give it options. All are of this release: they see the rows of many units. What another distribution
brings is a converter, which sees one unit's (data/converters)."""

from __future__ import annotations

from fedtune.core.data.sources._interface import Collection, Names, Row, Source
from fedtune.core.registry import Group

__all__ = ["SOURCES", "Collection", "Names", "Row", "Source", "by_suffix"]

SOURCES = Group("sources", "data.source", __name__, Source, foreign=False)  # type: ignore[type-abstract]


def by_suffix() -> dict[str, Source]:
    """Map each file suffix to this release's source."""
    kinds = [SOURCES.load(name) for name in SOURCES.release()]
    return {suffix: kind() for kind in kinds for suffix in kind.suffixes}
