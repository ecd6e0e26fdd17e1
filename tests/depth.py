"""How much of a matrix each run has; the rest is `long`, which CONTRIBUTING.md says who runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def long_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return a test's parameters, all but the `quick` ones marked as long."""
    cases = list(cases)
    assert all(case in cases for case in quick), "a quick case that is none of the matrix"
    return long_of([case for case in cases if case not in quick], cases)


def long_of(slow: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Return a test's parameters, the `slow` ones marked as long."""
    cases = list(cases)
    assert all(case in cases for case in slow), "a slow case that is none of the matrix"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        if case in slow
        else case
        for case in cases
    ]
