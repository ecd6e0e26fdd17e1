"""Measure what a request costs where a site's halves share a socket, a folder, or a folder and a
vault that is started for each request (`[vault] run`).

    OMP_NUM_THREADS=1 python -m benchmarks.spool [--rounds 6]

A coordinator and one site as processes of one machine, with a tiny base; a round is one request.
Its seconds are the coordinator's own, as in the report; the first round is left out, in which a
vault that stays loads its base and runs its self-test. Processor time is of all processes of a
study, over its requests. The three ways take turns.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median

from fedtune.flower.ports import free_port
from tests.conftest import tiny_llama
from tests.network.kit import FEDTUNE, PRIVATE, consortium, end, until

SITE = "north"
WAYS = ("a socket", "a folder", "a folder, a vault for each request")


def measure(way: str, base: Path, rounds: int) -> tuple[list[float], float]:
    """Run a study; return the seconds of each round but the first, and of processor time a
    request. Errors: SystemExit where it fails."""
    before = _processor_time()
    with (
        tempfile.TemporaryDirectory() as name,
        consortium(Path(name), "127.0.0.1", free_port()) as made,
    ):
        made.lay_out(base, PRIVATE, rounds, min_sites=1, round_timeout=600)
        server = made.server()
        until(made.listens, 120, made.told)
        made.join(SITE)
        if way == WAYS[2]:
            with (made.root / SITE / "site.toml").open("a") as file:
                file.write(f'\n[vault]\nrun = "{shlex.join(FEDTUNE)}"\n')
        start = made.half if way == WAYS[0] else made.spooled
        vault, courier = start(SITE, "vault"), start(SITE, "courier")
        if server.wait(1200) != 0:
            raise SystemExit(made.told())
        end(courier)
        end(vault)
        seconds = [entry["seconds"] for entry in made.report()["rounds"]]
    return seconds[1:], (_processor_time() - before) / (rounds + 1)  # the plan is a request, too


def _processor_time() -> float:
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    chosen = parser.parse_args()
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_llama(Path(folder) / "tiny")
        for _ in range(chosen.repeats):
            for way in WAYS:
                of_rounds, of_request = measure(way, base, chosen.rounds)
                seconds[way] += of_rounds
                processor[way].append(of_request)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print("| between the halves | a round, s | least to most | processor time a request, s |")
    print("|---|---|---|---|")
    for way in WAYS:
        of = sorted(seconds[way])
        span = f"{of[0]:.2f} to {of[-1]:.2f}"
        print(f"| {way} | {median(of):.2f} | {span} | {median(processor[way]):.2f} |")


if __name__ == "__main__":
    main()
