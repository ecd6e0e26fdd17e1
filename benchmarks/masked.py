"""What secure aggregation adds to a round: its time at 3 and 10 sites, and what a site sends.

    python -m benchmarks.masked [--sites 3 10] [--records 64]

The same study with and without it, in turns: SmolLM2, adapters on every block, all sites in one
process, so that the sites' masks are made one after another and not at once as in a consortium. A
round's seconds are the report's; the first round of each run, which loads the model, is left out.
Writes OUT/masked.md and .json. The coordinator's memory: benchmarks.scale --sites 100 --secure."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.federation import SHARE, prepare
from benchmarks.measure import Bound, Table
from examples.write import Table as Toml
from fedtune import load_site, load_study, simulate

BESIDE = 64 * 1024  # bytes of a message that are no numbers


def rounds(folder: Path, sites: int, records: int, secure: bool) -> dict[str, Any]:
    """Run one study; the seconds of its rounds but the first, and the most that a site sent."""
    file, files = prepare(folder, sites, records, SHARE)
    tables: Toml = {"wire": {"update": "int8"}}
    if secure:
        tables["secure_aggregation"] = {"colluding": 1}
    study = load_study(file).changed(**tables)
    policy = {"max_fallback_epsilon": 100.0}
    loaded = [load_site(path).changed(policy=policy) for path in files]
    report = simulate(study, loaded, folder / "run").report
    later = report["rounds"][1:]
    return {
        "seconds": [entry["seconds"] for entry in later],
        "bytes": max(max(entry["bytes_up"].values()) for entry in later),
        "numbers": report["adapter"]["parameters"],
    }


def row(sites: int, records: int, turns: int) -> dict[str, Any]:
    """Measure both ways in turns; medians and what follows."""
    by_way: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for turn in range(turns):
        for secure in (False, True):
            with tempfile.TemporaryDirectory() as name:
                by_way[secure].append(rounds(Path(name), sites, records, secure))
            took = measure.spread(by_way[secure][-1]["seconds"], 2)
            way = "masked" if secure else "plain"
            print(f"{sites} sites, {way}, turn {turn + 1} of {turns}: {took} s", flush=True)
    seconds = {way: [s for run in runs for s in run["seconds"]] for way, runs in by_way.items()}
    sent, numbers = by_way[True][0]["bytes"], by_way[True][0]["numbers"]
    return {
        "sites": sites,
        "records each": records,
        "numbers": numbers,
        "plain round, s": measure.spread(seconds[False], 2),
        "masked round, s": measure.spread(seconds[True], 2),
        "times": measure.ratio(seconds[True], seconds[False]),
        "sent, bytes": sent,
        "beyond 64 KiB, bytes a number": (sent - BESIDE) / numbers,
        "machine": measure.machine("bfloat16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--records", type=int, default=8, help="of each site")
    parser.add_argument("--turns", type=int, default=2)
    chosen = parser.parse_args()
    measure.start(chosen)
    if chosen.quick:
        chosen.sites, chosen.records, chosen.turns = [3], 8, 1
    table = Table("masked", "A masked round beside a plain one, all sites in one process")
    for sites in chosen.sites:
        table.rows.append(row(sites, chosen.records, chosen.turns))
        last = table.rows[-1]
        name = f"masked, {sites} sites"
        sent = last["beyond 64 KiB, bytes a number"]
        table.bounds += [
            Bound(f"{name}: times a plain round", last["times"], 1.2),
            Bound(f"{name}: bytes a number", sent, 4.2),
        ]
        table.save(chosen.out)
    print(table.markdown())


if __name__ == "__main__":
    main()
