"""Count what a site has on disk in a round before it goes on: syncs by what they protect, and SQL
statements.

    python -m benchmarks.durable [--sites 10]

A simulation with a tiny base under `strace`, which also sees SQLite's syncs. Nothing is timed: the
counts are the same on every machine. Those of a run of two rounds are taken off those of a run of
four, so that what a study begins and ends with does not count. Writes OUT/durable.md and .json."""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from benchmarks.federation import SCALE, prepare
from benchmarks.measure import Bound, Table
from fedtune import load_site, load_study, simulate
from tests.conftest import tiny_llama

ROUNDS = (2, 4)
PATIENTS = 32  # of a site
SYNC = re.compile(r"\b(?:fsync|fdatasync)\(\d+<(.+?)>\)")
DRAFT = re.compile(r"\.[0-9a-f]{8}\.[0-9]+\.new\Z")  # as files.writing names it
PROTECTS = {  # file of a site, or folder -> why a power cut must not take it
    "ledger.receipt": "what the coordinator countersigned, before anything is charged",
    "ledger.db-journal": "what undoes a commit that is cut short: its pages, then their count",
    "ledger.db": "the reservation, before a step; the release, before the update is sent",
    "ledger.head": "the anchor, which shows that entries were taken out",
    "state/": "names: of the receipt, of the anchor, of the journal before and after its commit",
    "steps.jsonl": "the step, before its noised sum exists",
    "outbox/*": "the update, before it is released",
    "outbox/": "the update's name",
    "audit.jsonl": "the act, before the update leaves",
}
MOST = 20  # syncs a site and round


def run(folder: Path, sites: int, rounds: int) -> dict[str, int]:
    """Simulate `rounds` rounds; count the statements and transactions of the sites' ledgers."""
    counted = Counter[str]()

    def connect(path: Path, **settings: Any) -> sqlite3.Connection:
        connection = sqlite3_connect(path, **settings)
        if Path(path).name.startswith("ledger.db"):  # the ledger opens it by a URI
            connection.set_trace_callback(count)
        return connection

    def count(statement: str) -> None:
        counted.update(["statements"])
        counted.update(["transactions"] if statement.startswith("COMMIT") else [])

    file, files = prepare(folder, sites, PATIENTS, SCALE)
    base = {"model": str(tiny_llama(folder / "tiny")), "dtype": "float32"}
    study = load_study(file).changed(
        base=base, training={"rounds": rounds}, objective={"overflow": "truncate"}
    )
    taking = [load_site(path).changed(policy={"bases": "any"}) for path in files]
    sqlite3_connect = sqlite3.connect
    with patch.object(sqlite3, "connect", connect):
        simulate(study, taking, folder / "out")
    return dict(counted)


def trace_run(sites: int, rounds: int) -> Counter[str]:
    """Run the simulation in a process under strace; count its syncs by file, and its statements.
    Errors: SystemExit where it fails, or there is no strace."""
    with tempfile.TemporaryDirectory() as name:
        trace, request = Path(name) / "trace", {"sites": sites, "rounds": rounds, "folder": name}
        strace = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(trace)]
        one = [sys.executable, "-m", "benchmarks.durable", "--one", json.dumps(request)]
        try:
            process = subprocess.run(strace + one, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit("no strace on this machine, by which syncs are counted") from None
        told = [line for line in process.stdout.splitlines() if line.startswith(measure.RESULT)]
        if not told:
            raise SystemExit(process.stderr)
        counted = Counter(json.loads(told[0].removeprefix(measure.RESULT)))
        counted.update(map(kind_of, SYNC.findall(trace.read_text())))
    return counted


def kind_of(path: str) -> str:
    """Name a synced file or folder of a site as in PROTECTS; what is not a site's is the
    coordinator's."""
    if path.endswith("/state"):
        return "state/"
    inside = path.partition("/state/")[2]
    name, *within = inside.split("/")
    if within or "." not in name:
        return f"{name}/{'*' if within else ''}" if name else "coordinator"
    return DRAFT.sub("", name)


def count_syncs(sites: int) -> Table:
    """Build the table of what a site has on disk in a round."""
    few, many = (trace_run(sites, rounds) for rounds in ROUNDS)
    each = sites * (ROUNDS[1] - ROUNDS[0])
    of_round = {kind: (many[kind] - few[kind]) / each for kind in many}
    title = f"What a site has on disk in a round ({sites} sites of {PATIENTS} patients)"
    table = Table("durable", title)
    syncs = {kind: n for kind, n in of_round.items() if kind not in ("statements", "transactions")}
    known = [*PROTECTS, *sorted(set(syncs) - set(PROTECTS))]
    table.rows = [
        {"synced": kind, "times": syncs[kind], "so that a power cut keeps": PROTECTS.get(kind, "")}
        for kind in known
        if syncs.get(kind)
    ]
    of_site = sum(n for kind, n in syncs.items() if kind != "coordinator")
    table.bounds = [Bound("syncs a site and round", of_site, MOST)]
    table.notes.append(
        f"{of_round['statements']:.0f} SQL statements a site and round, in "
        f"{of_round['transactions']:.0f} transactions of its ledger."
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write")
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        given = json.loads(chosen.one)
        measure.answer(run(Path(given["folder"]), given["sites"], given["rounds"]))
        return
    table = count_syncs(chosen.sites)
    table.save(chosen.out)
    print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
