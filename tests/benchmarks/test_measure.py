"""Clocks, memory marks and verdicts."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Bound, Table

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the mark is Linux's own")


class Named:
    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def step(self) -> None:
        self.seen.append(self.name)


def test_every_round_runs_every_variant_once_and_nobody_always_goes_first() -> None:
    seen: list[str] = []
    gc.freeze()  # what other tests left need not be swept before each of these
    took = measure.interleaved([Named(n, seen) for n in "abc"], rounds=6, warm=0)
    gc.unfreeze()
    rounds = [seen[at : at + 3] for at in range(0, 18, 3)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert {order[0] for order in rounds} == set("abc")
    assert all(len(times) == 6 for times in took.values())


def test_ratios_are_of_pairs_and_not_of_medians() -> None:
    # The machine was three times as slow in two rounds, for both alike.
    assert measure.ratio([2.0, 6.0, 6.0], [1.0, 3.0, 3.0]) == 2.0


@pytest.mark.parametrize(
    "bound, verdict",
    [
        (Bound("x", 1.05, 1.05), "met"),
        (Bound("x", 1.06, 1.05), "MISSED"),
        (Bound("x", 1.4, 1.4, least=True), "met"),
        (Bound("x", 1.39, 1.4, least=True), "MISSED"),
        (Bound("x", float("nan"), 1.0), "MISSED"),
        (Bound("x", None, 1.0), "not measured"),
    ],
)
def test_a_bound_says_whether_it_holds(bound: Bound, verdict: str) -> None:
    assert bound.verdict == verdict
    assert verdict in Table("t", "T", [{"a": 1.0}], [bound]).markdown()


@LINUX
def test_the_peak_counts_what_was_freed_and_forgets_what_was_before() -> None:
    before = measure.reset_peak()
    held = torch.ones(64 * 2**18)  # 64 MiB
    del held
    assert measure.peak() - before > 60
    now = measure.reset_peak()
    assert measure.peak() - now < 10


def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        measure.fresh("benchmarks.nowhere")


def test_what_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[tuple[str, str]] = []

    def run(seed: str, arm: str) -> dict[str, int]:
        ran.append((seed, arm))
        if (seed, arm) == ("1", "b") and len(ran) < 4:
            raise KeyboardInterrupt
        return {"n": len(ran)}

    def table(results: measure.Results) -> str:
        return " ".join(f"{seed}:{'+'.join(arms)}" for seed, arms in results.items())

    wanted = [(seed, arm) for seed in "01" for arm in "ab"][1:]
    out = tmp_path / "runs" / "one"
    with pytest.raises(KeyboardInterrupt):
        measure.resume(out, wanted, run, table)
    assert (out / "table.md").read_text() == "0:b 1:a"
    measure.resume(out, wanted, run, table)
    assert ran == [("0", "b"), ("1", "a"), ("1", "b"), ("1", "b")]
    assert (out / "table.md").read_text() == "0:b 1:a+b"
