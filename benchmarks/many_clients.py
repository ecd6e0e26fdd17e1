"""Measure a coordinator with many real clients: each site is `fedtune client` as a user starts it,
with its courier, its vault and its Flower SuperNode, over TLS on loopback.

    python -m benchmarks.many_clients [--sites 10 30 100] [--rounds 4] [--out runs/bench]

The base is tiny, so that a round is what the deployment costs. Clients are started one after
another; before each the memory that is left is looked at, swap included, and a size that would not
fit is listed with how far it came. Per size: a round's seconds as the coordinator reports them, the
processor time that its programs took in a round, their memory, and a site's memory, shared pages
divided by those who share them (PSS). Writes OUT/many_clients.md and .json after each size."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from benchmarks.measure import Table
from fedtune.flower.ports import free_port
from tests.conftest import tiny_llama
from tests.network import kit

LEFT = 2048  # MiB, with swap, that a machine keeps for itself
TICKS = os.sysconf("SC_CLK_TCK")


def figure(path: str, key: str) -> float:
    """Read a figure that Linux gives in kB, and return it in MiB; 0 if the process has ended.

    path: a file of /proc, such as /proc/PID/status; key: the first word of the figure's line"""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def memory_left() -> float:
    """MiB that programs can still be given, swap included."""
    return sum(figure("/proc/meminfo", key) for key in ("MemAvailable", "SwapFree"))


def processor(pids: Iterable[int]) -> float:
    """Seconds of processor time that these processes have used."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def programs(process: Any) -> dict[str, int]:
    """A command and the programs that it started, by name."""
    return {"fedtune": process.pid} | kit.children(process.pid)


def row(base: str, sites: int, rounds: int, root: Path) -> dict[str, Any]:
    """Run a study with so many clients. Return a row of the table or, if memory did not suffice,
    how many clients were started."""
    names = tuple(f"s{number:03}" for number in range(sites))
    with (
        patch.object(kit, "SITES", names),
        kit.consortium(root, "127.0.0.1", free_port()) as made,
    ):
        made.lay_out(base, kit.PRIVATE, rounds, round_timeout=1800)
        server = made.server()
        kit.until(made.listens, 120, made.told)
        began = time.monotonic()
        clients: list[Any] = []
        for name in names:
            if memory_left() < LEFT:
                return {"sites": sites, "started": len(clients), "note": "memory ended"}
            made.join(name)
            clients.append(made.client(name, "--once"))
            while len(clients) > 8 and len(kit.children(clients[-8].pid)) < 2:
                time.sleep(0.2)  # not all at once: each takes seconds of a core to start
        kit.until(lambda: made.rounds() >= 1, 3600, made.told)
        started, own = time.monotonic() - began, programs(server)
        used, at = processor(own.values()), made.rounds()
        now, done = used, at
        of_site = [
            sum(figure(f"/proc/{pid}/smaps_rollup", "Pss") for pid in programs(each).values())
            for each in clients[:: max(1, sites // 5)]
        ]
        peaks: dict[str, float] = {}
        while server.poll() is None and made.rounds() < rounds:
            time.sleep(0.2)
            now, done = processor(own.values()), made.rounds()
            peaks = {
                name: max(peaks.get(name, 0.0), figure(f"/proc/{pid}/status", "VmHWM"))
                for name, pid in own.items()
            }
        if server.wait(600):
            raise SystemExit(made.told())
        took = [entry["seconds"] for entry in made.report()["rounds"]]
        for client in clients:
            client.wait(300)
        return {
            "sites": sites,
            "until round 1 was done, s": round(started, 1),
            "later rounds, s": measure.spread(took[1:], 2),
            "a site, ms": round(1000 * median(took[1:]) / sites),
            "coordinator's processor time, s a round": round((now - used) / max(1, done - at), 2),
            "memory at peak, MiB": ", ".join(f"{n} {mib:.0f}" for n, mib in peaks.items()),
            "a site's memory (PSS), MiB": round(median(of_site)),
            "machine": measure.machine("float32"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--rounds", type=int, default=4)
    chosen = parser.parse_args()
    measure.start(chosen)
    table = Table(
        "many_clients", f"A coordinator and its clients as processes, {chosen.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as name:
        tiny = str(tiny_llama(Path(name) / "tiny"))
        for sites in chosen.sites:
            table.rows.append(row(tiny, sites, chosen.rounds, Path(name) / f"of-{sites}"))
            print(table.rows[-1], flush=True)
            table.save(chosen.out)
    print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
