"""The benchmark of a thousand sites goes through everything that a round goes through."""

from __future__ import annotations

from benchmarks import scale


def test_every_site_is_taken_in() -> None:
    found = scale.measure(sites=3, megabytes=0.05)
    assert 1 in found and found[1] > 0
