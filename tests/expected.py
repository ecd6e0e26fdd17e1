"""Expected errors, where any other error has to fail by an assertion: a seeded bug counts as caught
only then (tests/mutants/outcome.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_only(kind: type[Exception], match: str = "") -> Iterator[None]:
    """Check that the block raises this kind of error, as pytest.raises does, and no other."""
    try:
        with pytest.raises(kind, match=match):
            yield
    except Exception as error:
        pytest.fail(f"in place of {kind.__name__}: {type(error).__name__}: {error}")


@contextmanager
def raises_nothing() -> Iterator[None]:
    """Check that the block raises no error of the code under test."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
