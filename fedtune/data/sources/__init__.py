"""Data sources: one module each, a frozen dataclass whose fields are [data.options].

A file's suffix says which one of this release reads it. A site may name one (data.source in its own
site.toml): of this release, to give it options, or one that another distribution brings."""

from __future__ import annotations

from fedtune.data.sources._interface import Collection, Names, Row, Source
from fedtune.registry import Group

__all__ = ["SOURCES", "Collection", "Names", "Row", "Source", "by_suffix"]

SOURCES = Group("sources", "data.source", __name__, Source)  # type: ignore[type-abstract]


def by_suffix() -> dict[str, Source]:
    """Map each file suffix to this release's source."""
    kinds = [SOURCES.load(name) for name in SOURCES.release()]
    return {suffix: kind() for kind in kinds for suffix in kind.suffixes}
