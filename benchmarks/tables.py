"""Measure the cost of privacy on real data: every arm of an example, over seeds, in one process.

    python -m benchmarks.tables mts_dialog --data DATA --seeds 0 1 2 --out runs/mts
    python -m benchmarks.tables medquad --data DATA --seeds 0 --out runs/tune --tune

DATA holds one folder a data set (medquad/train.jsonl, …). Writes OUT/table.md and OUT/results.json,
both after every arm; arms that results.json already holds are not run again. With --tune, the
settings of `TUNING` are tried on the validation records instead: the test records choose nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measure import at_least, mean_sd
from benchmarks.sets import FSDD, MTS, PREFERENCE, QUAD, QUAD_128, VQA, DataSet
from examples.write import Table, merged, toml
from fedtune import Site, Study, load_site, load_study, simulate
from fedtune.core.config import noise_shares
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.shared_noise import joint_sigma
from fedtune.core.dp.steplog import StepLog, events
from fedtune.core.models import lora
from fedtune.core.models.adapter_files import load_adapter
from fedtune.core.registry import process_cache
from fedtune.evaluation.evaluator import Evaluator

SETS = {each.name: each for each in (QUAD, QUAD_128, MTS, VQA, FSDD, *PREFERENCE)}
TWIN, LOCAL = "non-private", "local"


@dataclass
class Bench:
    """One data set at one seed: prepared once, its sites' cached states shared by the arms."""

    dataset: DataSet
    seed: int
    folder: Path
    held_out: str
    sites: list[Path] = field(default_factory=list)
    _key: object = None
    _evaluator: Evaluator | None = None

    def __post_init__(self) -> None:
        process_cache.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.sites = self.dataset.write(self.folder / "data", self.seed)

    def measure(self, tables: Table, adapter: Path | None) -> dict[str, float]:
        """Held-out quality of a run's adapter, or of the base under the same plan."""
        saved = load_adapter(adapter) if adapter else {}
        study = self._plan(tables, "measure", self.held_out)
        frozen = {name: value for name, value in saved.items() if "lora_A" in name}
        if adapter is None and study.lora:  # without an adapter A has no say
            asked = study.lora.model_copy(update={"a_init": "seed"})
            study = study.model_copy(update={"lora": asked})
        elif study.lora:
            asked = study.lora.model_copy(update={"a_init": "public"})
            study = study.model_copy(update={"lora": asked})
        key = (study.lora, lora.digest(frozen))
        if self._evaluator is None or key != self._key:
            self._key, self._evaluator = key, Evaluator(study, frozen)
        names = self._evaluator.network.parameters()
        return self._evaluator.measure({n: saved[n] for n in names} if adapter else None)

    def run(self, name: str, tables: Table, only: int | None = None) -> tuple[Path, dict[str, Any]]:
        """One federated study, or site number `only` alone. Each arm has site files with ledgers of
        their own: it asks what it alone would cost."""
        study = self._plan(tables, "plan-trained", None)
        sites = [self._site(path, study.private, name) for path in self.sites]
        sites = sites if only is None else sites[only : only + 1]
        out, started = self.folder / "runs" / name, time.monotonic()
        simulate(study, sites, out)
        logs = [StepLog(site.site.state / "steps.jsonl") for site in sites]
        # Steps without noise are in the log, too, and have no ε.
        steps = [[step for step in log.steps() if step.noise_multiplier > 0] for log in logs]
        shares, delta = noise_shares(study), self.dataset.delta
        joint = [
            [replace(s, noise_multiplier=joint_sigma(s.noise_multiplier, shares)) for s in logged]
            for logged in steps
        ]
        ran: dict[str, Any] = {
            "epsilon": max((epsilon(events(logged), delta) for logged in joint), default=0.0),
            "sigma": max((s.noise_multiplier for log in joint for s in log), default=0.0),
            "seconds": round(time.monotonic() - started, 1),
        }
        if shares > 1:  # what holds without any trust in the aggregation
            ran["fallback"] = max(epsilon(events(logged), delta) for logged in steps)
        return out / "adapter", ran

    def _plan(self, tables: Table, name: str, held_out: str | None) -> Study:
        path = self.folder / "data" / f"{name}.toml"
        evaluation = {"path": held_out} if held_out else None
        toml(path, merged(tables, {"evaluation": evaluation}), "written by benchmarks.tables")
        return load_study(path)

    def _site(self, strict: Path, private: bool, arm: str) -> Site:
        """The site's own file, or the one whose policy admits privacy = "off", for one arm."""
        open_ = strict.parents[2] / "open" / strict.parent.name / strict.name
        site = load_site(strict if private else open_)
        state = site.site.state.with_name(f"state-{arm}")
        # What a hospital would refuse: nine sites at ε = 8 leave each with σ = 0.17 of its own.
        policy = {"max_fallback_epsilon": 100.0, "min_noise_multiplier": 0.1}
        return site.changed(site={"state": state}, policy=policy)


def arm(bench: Bench, name: str) -> dict[str, Any]:
    """One row of the table at one seed."""
    tables = bench.dataset.study("epsilon-8" if name == "base" else name, bench.seed)
    if name == "base":
        return bench.measure(tables, None)
    if name != LOCAL:
        adapter, ran = bench.run(name, tables)
        return ran | bench.measure(tables, adapter)
    by_site = []
    for number, site in enumerate(bench.sites):
        adapter, ran = bench.run(f"{LOCAL}-{site.parent.name}", tables, only=number)
        by_site.append(ran | bench.measure(tables, adapter))
    means = {key: mean(row[key] for row in by_site) for key in by_site[0]}
    means["seconds"] = sum(row["seconds"] for row in by_site)
    names = [site.parent.name for site in bench.sites]
    return means | {
        "sites": dict(zip(names, (row[bench.dataset.metric] for row in by_site), strict=True))
    }


def table(dataset: DataSet, results: dict[str, dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over the seeds that have run every arm asked for."""
    metric, sign = dataset.metric, -1 if dataset.metric == "loss" else 1
    seeds = sorted(results, key=int)
    lines = [
        f"{dataset.title}: {metric} on held-out {dataset.unit}s, {len(seeds)} seeds "
        f"({', '.join(seeds)}), mean ± sd; δ = {dataset.delta:g}, unit: {dataset.unit}.",
        "",
        f"| arm | ε from the step log | {metric} | gain over base | at least (95 %) "
        "| share of the σ = 0 gain |",
        "|---|---|---|---|---|---|",
    ]
    have = [seed for seed in seeds if {"base", TWIN} <= results[seed].keys()]
    for name, title in dataset.rows.items():
        runs = [seed for seed in have if name in results[seed]]
        if not runs:
            continue
        values = [results[seed][name][metric] for seed in runs]
        gains = [sign * (results[s][name][metric] - results[s]["base"][metric]) for s in runs]
        full = [sign * (results[s][TWIN][metric] - results[s]["base"][metric]) for s in runs]
        spent = max(results[seed][name].get("epsilon", 0.0) for seed in runs)
        share = "" if name == "base" else f"{mean(gains) / mean(full):.0%}" if mean(full) else "–"
        gain = "" if name == "base" else mean_sd(gains, "+")
        low = "" if name == "base" else at_least(gains, "+")
        title += f" ({len(runs)} of {len(have)} seeds)" if len(runs) < len(have) else ""
        shown = f"{spent:.2f}" if spent else ("–" if name == "base" else "none: not private")
        lines.append(f"| {title} | {shown} | {mean_sd(values)} | {gain} | {low} | {share} |")
    return "\n".join(lines) + "\n"


def compare(dataset: DataSet, seeds: list[int], out: Path, arms: list[str]) -> str:
    """Run what is missing, arm by arm; returns the table."""
    results_file = out / "results.json"
    results: dict[str, dict[str, Any]] = (
        json.loads(results_file.read_text()) if results_file.exists() else {}
    )
    for seed in seeds:
        by_arm = results.setdefault(str(seed), {})
        missing = [name for name in dataset.rows_in_order if name in arms and name not in by_arm]
        bench = Bench(dataset, seed, out / f"seed-{seed}", "test.jsonl") if missing else None
        for name in missing:
            assert bench is not None
            by_arm[name] = arm(bench, name)
            print(f"seed {seed}, {name}: {json.dumps(by_arm[name])}", flush=True)
            results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (out / "table.md").write_text(table(dataset, results), encoding="utf-8")
    return table(dataset, results)


def tune(dataset: DataSet, seeds: list[int], out: Path, arms: list[str]) -> Iterator[str]:
    """Each setting of TUNING on the validation records, one line each."""
    for seed in seeds:
        bench = Bench(dataset, seed, out / f"tune-{seed}", "validation.jsonl")
        number = 0
        for name, choices in dataset.tuning.items():
            for change in choices if name in arms else ():
                tables = merged(dataset.study(name, seed), change)
                number += 1
                if name == LOCAL:
                    ran = [
                        bench.run(f"{number}-{i}", tables, i)[0] for i in range(len(bench.sites))
                    ]
                    value = mean(bench.measure(tables, a)[dataset.metric] for a in ran)
                else:
                    value = bench.measure(tables, bench.run(str(number), tables)[0])[dataset.metric]
                line = f"seed {seed} | {name} | {json.dumps(change)} | {value:.4f}"
                with (out / "tuning.md").open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--arms", nargs="+", help="only these (default: all)")
    parser.add_argument("--tune", action="store_true", help="settings on the validation records")
    args = parser.parse_args()
    dataset = SETS[args.set].at(args.data, args.out)
    arms = args.arms or [*dataset.rows]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tune:
        for line in tune(dataset, args.seeds, args.out, arms):
            print(line, flush=True)
    else:
        print(compare(dataset, args.seeds, args.out, arms))


if __name__ == "__main__":
    main()
