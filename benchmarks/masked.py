"""What secure aggregation adds to a round: its time at 3 and 10 sites, and what a site sends.

    python -m benchmarks.masked [--sites 3 10] [--records 64] [--out runs/masked]

The same study with and without it, in turns: SmolLM2, adapters on every block, all sites in one
process, so that the sites' masks are made one after another and not at once as in a consortium. A
round's seconds are the report's; the first round of each run, which loads the model, is left out.
The coordinator's memory: python -m benchmarks.scale --sites 100 --secure."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.federation import SHARE, prepare
from examples.write import Table as Toml
from fedtune import load_site, load_study, simulate

TURNS = 2
TIME, BYTES = 1.2, 4.2  # must hold: of a round's seconds without it; bytes a number, and 64 KiB
BESIDE = 64 * 1024


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


def compare(sites: int, records: int) -> dict[str, Any]:
    """Measure both ways in turns; returns the medians and what follows."""
    by_way: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(TURNS):
        for secure in (False, True):
            with tempfile.TemporaryDirectory() as name:
                by_way[secure].append(rounds(Path(name), sites, records, secure))
    seconds = {way: [s for run in runs for s in run["seconds"]] for way, runs in by_way.items()}
    sent, numbers = by_way[True][0]["bytes"], by_way[True][0]["numbers"]
    return {
        "sites": sites,
        "numbers": numbers,
        "without": round(median(seconds[False]), 2),
        "masked": round(median(seconds[True]), 2),
        "times": round(median(seconds[True]) / median(seconds[False]), 3),
        "sent": sent,
        "a number": round((sent - BESIDE) / numbers, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10])
    parser.add_argument("--records", type=int, default=64, help="of each site")
    parser.add_argument("--out", type=Path, default=Path("runs/masked"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for sites in args.sites:
        rows.append(compare(sites, args.records))
        print(json.dumps(rows[-1]), flush=True)
        (args.out / "masked.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        verdict = "met" if row["times"] <= TIME and row["a number"] <= BYTES else "MISSED"
        print(f"{row['sites']} sites: {row['times']} × a round without it, {verdict}")


if __name__ == "__main__":
    main()
