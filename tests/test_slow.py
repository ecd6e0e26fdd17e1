"""`make test` leaves slow tests out, but none that a seeded bug names."""

from __future__ import annotations

import pytest

from tests.slow import KEPT, choose, named_by_bugs, slow_tests


def test_no_seeded_bug_names_a_slow_test() -> None:
    took = dict.fromkeys(slow_tests(), 1.0)
    assert choose(took, named_by_bugs(), 0.0) == sorted(slow_tests())


def test_what_is_named_or_kept_or_quick_is_not_chosen() -> None:
    """The twin."""
    took = {"a.py::slow": 3.0, "a.py::quick": 1.0, "b.py::f[x]": 3.0, f"{KEPT[0]}[y]": 3.0}
    assert choose(took, ["b.py"], 2.0) == ["a.py::slow"]
    assert choose(took, ["b.py::f"], 2.0) == choose(took, ["b.py::f[x]"], 2.0) == ["a.py::slow"]
    assert choose(took, ["a.py::slow"], 2.0) == ["b.py::f[x]"]


def test_a_slow_test_counts_as_long(request: pytest.FixtureRequest) -> None:
    """Of all that this process collected: a slow test that is not marked would be among them."""
    slow = [item for item in request.session.items if item.nodeid in slow_tests()]
    assert all(item.get_closest_marker("long") for item in slow)
