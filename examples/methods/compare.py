"""Compare methods of other groups with fedtune's own, on the same sites, splits, bases and ε.

    pip install ./examples/methods                       # names the three strategies
    python -m examples.methods.compare --data DATA --out runs/methods --sets mts_dialog --epsilons 3

DATA holds one folder for each data set, as for `benchmarks.tables`, which splits and measures. For
each set, method and ε three settings are tried on the validation records of seed 0, and the best of
them is used for every seed; the run without noise uses the setting of the largest ε. The settings
of fedtune's own plan are those of docs/quality.md, which were chosen in the same way. Each run adds
a line to OUT/results.jsonl, and a run that has a line is not repeated. The table is printed at the
end; with --table it is printed without running anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.sets import MTS, QUAD, DataSet
from benchmarks.tables import Bench
from examples.methods import Settings, dp_adambc, fed_sb, ffa_lora, prototypes, rolora
from examples.mts_dialog.prepare import DESCRIPTIONS
from examples.write import Table, jsonl, merged
from fedtune import Site
from fedtune.core.errors import ConfigError
from fedtune.core.strategy import STRATEGIES

EPSILONS = (1.0, 3.0, 8.0)
OFF = 0.0  # stands for ε in the line of a run without noise
PLUGINS = ("rolora", "dp_adambc", "nearest_mean")
TUNED_ON = 0  # the seed whose validation records choose


@dataclass(frozen=True)
class Method:
    """One row of the table. plans: by data set, the changes to fedtune's own plan; tried: the
    settings that are compared, none for fedtune's own."""

    name: str
    title: str
    plans: dict[str, Table]
    tried: dict[str, Settings]


def _own_lora() -> dict[str, Table]:
    """Return the tables of fedtune's own adapter for MTS-Dialog: like FFA-LoRA, but with A from
    public text."""
    public = {key: fed_sb.PLANS["mts_dialog"][key] for key in ("lora", "public")}
    own = merged(ffa_lora.PLANS["mts_dialog"], public)
    return {"mts_dialog": merged(own, {"lora": {"preconditioner": None}})}


METHODS = [
    Method("own", "fedtune's own plan (docs/quality.md)", {"mts_dialog": {}, "medquad": {}}, {}),
    Method(
        "statistics",
        "fedtune's class statistics",
        {"mts_dialog": prototypes.statistics("discriminant")},
        prototypes.TRIED,
    ),
    Method("own-lora", "fedtune's adapter, A from public text", _own_lora(), ffa_lora.TRIED),
    Method("ffa_lora", "FFA-LoRA", ffa_lora.PLANS, ffa_lora.TRIED),
    Method("rolora", "RoLoRA", rolora.PLANS, rolora.TRIED),
    Method("fed_sb", "Fed-SB", fed_sb.PLANS, fed_sb.TRIED),
    Method("dp_adambc", "DP-AdamBC", dp_adambc.PLANS, dp_adambc.TRIED),
    Method("prototypes", "DP prototypes", prototypes.PLANS, prototypes.TRIED),
]
BY_NAME = {method.name: method for method in METHODS}
# Approximate seconds of a run with one thread on an idle core, by data set and method; the
# measurements are described in docs/methods.md.
SECONDS = {
    ("mts_dialog", "own"): 30,
    ("mts_dialog", "statistics"): 25,
    ("mts_dialog", "own-lora"): 225,
    ("mts_dialog", "ffa_lora"): 225,
    ("mts_dialog", "rolora"): 270,
    ("mts_dialog", "fed_sb"): 225,
    ("mts_dialog", "dp_adambc"): 30,
    ("mts_dialog", "prototypes"): 25,
    ("medquad", "own"): 60,
    ("medquad", "ffa_lora"): 100,
    ("medquad", "rolora"): 150,
    ("medquad", "fed_sb"): 100,
    ("medquad", "dp_adambc"): 100,
}


def _with_descriptions(data: Path, out: Path, seed: int) -> list[Path]:
    """Write MTS-Dialog's files, and the sections' descriptions as public records."""
    rows = [{"dialogue": text, "section": name} for name, text in DESCRIPTIONS.items()]
    jsonl(out / "public.jsonl", rows)
    return MTS.prepare(data, out, seed)


SETS: dict[str, DataSet] = {
    "mts_dialog": replace(MTS, prepare=_with_descriptions),
    "medquad": QUAD,
}


class PluginBench(Bench):
    """A bench whose sites name the three strategies in their policy."""

    def _site(self, strict: Path, private: bool, arm: str) -> Site:
        site = super()._site(strict, private, arm)
        return site.changed(policy={"strategies": ["release", *PLUGINS]})


@dataclass(frozen=True)
class Run:
    """One line of the results. setting: number of the setting tried, -1 for fedtune's own plan;
    part: the held-out records that measure it."""

    data: str
    method: str
    epsilon: float
    seed: int
    setting: int
    part: str

    @property
    def key(self) -> str:
        return f"{self.data}-{self.method}-{self.epsilon:g}-{self.seed}-{self.setting}-{self.part}"

    def plan(self) -> Table:
        """Build the plan's tables: fedtune's own of this ε, the method's changes, the setting."""
        method = BY_NAME[self.method]
        arm = f"epsilon-{self.epsilon:g}" if self.epsilon else "non-private"
        tables = merged(SETS[self.data].study(arm, self.seed), method.plans[self.data])
        if self.setting >= 0:
            tried = method.tried[self.data][self.epsilon or max(EPSILONS)]
            tables = merged(tables, tried[self.setting])
        return merged(tables, {"study": {"seed": self.seed}})


class Results:
    """The lines of a file, by key. A line that was cut off is run again."""

    def __init__(self, file: Path) -> None:
        self._file, self.lines = file, dict[str, dict[str, Any]]()
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            self.lines[line["key"]] = line

    def add(self, run: Run, figures: dict[str, Any]) -> None:
        self.lines[run.key] = line = {"key": run.key, **vars(run), **figures}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, run: Run, metric: str) -> float | None:
        return self.lines.get(run.key, {}).get(metric)

    def best(self, data: str, method: str, epsilon: float) -> int | None:
        """Return the number of the setting with the best result on validation records; None unless
        all settings have results."""
        if not BY_NAME[method].tried:
            return -1
        metric = SETS[data].metric
        runs = tuning(data, method, epsilon)
        found = [self.of(run, metric) for run in runs]
        if any(value is None for value in found):
            return None
        values = [value if value is not None else 0.0 for value in found]
        best = min(values) if metric == "loss" else max(values)
        return values.index(best)


def tuning(data: str, method: str, epsilon: float) -> list[Run]:
    """List the runs by which a method's setting at this ε is chosen; for OFF, those of the largest
    ε."""
    epsilon = epsilon or max(EPSILONS)
    count = len(BY_NAME[method].tried[data][epsilon]) if BY_NAME[method].tried else 0
    return [Run(data, method, epsilon, TUNED_ON, n, "validation") for n in range(count)]


def wanted(
    results: Results, data: str, methods: list[str], epsilons: list[float], seeds: list[int]
) -> Iterator[Run]:
    """Yield the runs of one data set that the results lack. The runs that choose a setting come
    before those that use it."""
    for seed in seeds:
        for epsilon in epsilons:
            for name in methods:
                if data not in BY_NAME[name].plans:
                    continue
                runs = tuning(data, name, epsilon)
                yield from (run for run in runs if run.key not in results.lines)
                setting = results.best(data, name, epsilon)
                assert setting is not None  # the runs that choose it were yielded, and run, before
                run = Run(data, name, epsilon, seed, setting, "test")
                if run.key not in results.lines:
                    yield run


def expected_hours(
    results: Results, data: str, methods: list[str], epsilons: list[float], seeds: list[int]
) -> float:
    """Estimate the hours that the missing runs take, from SECONDS."""
    missing, total = set[str](), 0.0
    for name in (name for name in methods if data in BY_NAME[name].plans):
        for epsilon in epsilons:
            keys = {run.key for run in tuning(data, name, epsilon)} - results.lines.keys()
            tests = sum(
                not any(
                    line["part"] == "test"
                    and (line["data"], line["method"]) == (data, name)
                    and (line["epsilon"], line["seed"]) == (epsilon, seed)
                    for line in results.lines.values()
                )
                for seed in seeds
            )
            total += (len(keys - missing) + tests) * SECONDS[data, name]
            missing |= keys
    return total / 3600


def table(results: Results, epsilons: list[float], seeds: list[int]) -> str:
    """Return a Markdown table with a row for each set and method, of means over the seeds that were
    run."""
    shown = [f"ε = {epsilon:g}" if epsilon else "σ = 0" for epsilon in epsilons]
    lines = [f"| set | method | {' | '.join(shown)} |", "|---|---|" + "---|" * len(shown)]
    for data, dataset in SETS.items():
        for method in METHODS:
            cells = []
            for epsilon in epsilons if data in method.plans else []:
                setting = results.best(data, method.name, epsilon)
                runs = [Run(data, method.name, epsilon, s, setting or 0, "test") for s in seeds]
                if setting is None:
                    runs = []
                elif setting != 0:
                    runs = [replace(run, setting=setting) for run in runs]
                found = [v for run in runs if (v := results.of(run, dataset.metric)) is not None]
                cells.append(_cell(found))
            if any(cell != "–" for cell in cells):
                name = f"{dataset.title}, {dataset.metric}"
                lines.append(f"| {name} | {method.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: list[float]) -> str:
    if not found:
        return "–"
    if len(found) == 1:
        return f"{found[0]:.3f} (1 seed)"
    return f"{mean(found):.3f} ± {stdev(found):.3f} ({len(found)} seeds)"


def run_all(args: argparse.Namespace, results: Results) -> None:
    """Run the missing runs, and write a line for each."""
    if missing := sorted(set(PLUGINS) - set(STRATEGIES.installed())):
        raise ConfigError(
            f"the strategies {', '.join(missing)} are not installed",
            "the distribution of this folder",
            "pip install ./examples/methods",
        )
    for data in args.sets:
        dataset = SETS[data].at(args.data, args.out)
        benches: dict[tuple[int, str], PluginBench] = {}
        grid = (data, args.methods, args.epsilons, args.seeds)
        print(f"{data}: about {expected_hours(results, *grid):.1f} hours of one idle core")
        for run in wanted(results, *grid):
            where = (run.seed, run.part)
            if where not in benches:
                benches.clear()  # one at a time: each holds a base's states
                folder = args.out / f"{data}-{run.seed}-{run.part}"
                benches[where] = PluginBench(dataset, run.seed, folder, f"{run.part}.jsonl")
            bench, tables, began = benches[where], run.plan(), time.monotonic()
            adapter, ran = bench.run(run.key, tables)
            figures = ran | bench.measure(tables, adapter)
            figures["epsilon_spent"] = figures.pop("epsilon")
            figures["seconds"] = round(time.monotonic() - began, 1)
            results.add(run, figures)
            print(f"{run.key}: {json.dumps(figures)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=sorted(BY_NAME), default=list(BY_NAME))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[*EPSILONS, OFF])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.jsonl")
    if not args.table:
        if args.data is None:
            parser.error("--data names the folder of data sets")
        run_all(args, results)
    print(table(results, args.epsilons, args.seeds))


if __name__ == "__main__":
    main()
