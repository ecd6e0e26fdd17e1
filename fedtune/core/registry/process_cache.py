"""Keep caches that live as long as the process, registered by name so that one call clears them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T", dict[Any, Any], set[Any], WeakKeyDictionary[Any, Any])
F = TypeVar("F", bound=Callable[..., Any])

_clear: dict[str, Callable[[], None]] = {}


def register(name: str, cache: T) -> T:
    """Register a cache (a dict, a set or a weak dict) under `name`, so that `clear` empties it.
    Return the cache."""
    _clear[name] = cache.clear
    return cache


def cached(name: str, maxsize: int | None = 1) -> Callable[[F], F]:
    """Return a decorator that keeps the last results of a function, like functools.lru_cache, and
    registers this cache under `name`, so that `clear` empties it. maxsize: how many results are
    kept; None: all."""

    def decorate(function: F) -> F:
        wrapped: Any = lru_cache(maxsize=maxsize)(function)
        _clear[name] = wrapped.cache_clear
        return wrapped  # type: ignore[no-any-return]

    return decorate


def clear(*names: str) -> None:
    """Empty the caches that were registered under these names; without names, every cache."""
    for name in names or _clear:
        _clear[name]()
