"""Each site's own model against the released one and against what the site learns alone.

    python -m benchmarks.personal --data DATA --seeds 0 1 2 --out runs/personal

The preset of `fedtune init --task classify` at ε = 3, and then `fedtune personalise` at each site.
MTS-Dialog's records are divided over five sites by a Dirichlet draw for each section (0.3, so that
sites differ much); ACI-Bench's patients belong to the programme that wrote their note. A seed draws
who is whose, which units are public, and the third of each site's units that nothing trains on: on
these the models are compared. Alone is the same fit with a pull towards what public records alone
give, so that only the other sites' part is missing. OUT/personal.jsonl gets a line for each site;
what is in it is not run again. OUT/table.md is written after every line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.presets import STRANGERS, Rows, read_rows, saved
from examples.write import Table, read_jsonl
from fedtune import Run, Site, load_sites, load_study, personalise, simulate
from fedtune.core.config import EvaluationTable
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.evaluation.run import evaluator_of
from fedtune.officer.personalise.personalise import own_study, train
from fedtune.officer.personalise.records import read_own
from fedtune.presets import Records, write
from fedtune.runs.personal import open_personal

SETS = {"mts_sections": 5, "aci_sections": 3}  # sites of each
EPSILON, CONCENTRATION, HELD_OUT = 3.0, 0.3, 1 / 3


def divided(name: str, data: Path, seed: int) -> tuple[list[tuple[Rows, Rows]], Rows]:
    """Each site's rows to train on and to test on, and the public rows; no unit is on two sides."""
    stranger = STRANGERS[name]
    units: dict[Any, Rows] = defaultdict(list)
    for number, row in enumerate(stranger.read(data, seed)):
        units[row[stranger.unit] if stranger.unit else number].append(row)
    names = sorted(units)
    random.Random(f"personal:{seed}").shuffle(names)
    draw = np.random.default_rng(seed)
    public, others = names[: stranger.sizes[1]], names[stranger.sizes[1] :]
    at: dict[Any, list[Any]] = defaultdict(list)
    if stranger.by_site:
        for unit in others:
            at[units[unit][0][stranger.by_site]].append(unit)
    else:
        shares: dict[str, Any] = {}
        for unit in others:
            section = units[unit][0][stranger.columns["target"]]
            if section not in shares:
                shares[section] = draw.dirichlet([CONCENTRATION] * SETS[name])
            at[int(draw.choice(SETS[name], p=shares[section]))].append(unit)
    flat = lambda chosen: [row for unit in chosen for row in units[unit]]  # noqa: E731
    sites = []
    for place in sorted(at):
        tested = round(len(at[place]) * HELD_OUT)
        sites.append((flat(at[place][tested:]), flat(at[place][:tested])))
    return sites, flat(public)


def prepared(name: str, data: Path, seed: int, out: Path) -> Path:
    """Write the files and the preset's study; the study's folder."""
    stranger = STRANGERS[name]
    sites, public = divided(name, data, seed)
    shutil.rmtree(out, ignore_errors=True)
    files, sizes = [], []
    for n, (own, held) in enumerate(sites, 1):
        files.append(saved(own, out / f"site-{n}" / f"records{stranger.kind}", None))
        saved(held, out / f"site-{n}" / f"held{stranger.kind}", None)
        units = len({row[stranger.unit] for row in own}) if stranger.unit else len(own)
        sizes.append(max(10, round(units, -1)))  # as a person declares it, roughly
    asked = Records(
        **stranger.columns,  # type: ignore[arg-type]
        patient=stranger.unit,
        data=tuple(files),
        evaluation=saved(public, out / "public" / f"public{stranger.kind}", None),
        sizes=tuple(sizes),
        epsilon=EPSILON,
    )
    write(out / "study", stranger.task, asked)
    return out / "study"


class Public(Run):
    """A run with what public records alone gave in place of what it released."""

    def adapter(self) -> Arrays:
        start = self.start()
        assert start is not None
        return super().adapter() | start


def measured(run: Run, site: Site, held: Path, unit: str | None) -> Table:
    """Personalise at one site, train there alone, and compare the models on records that neither
    saw."""
    public, study = Public(run.folder), own_study(run.study)
    ledger = Ledger(site.site.ledger or site.site.state)
    network = build(study)
    vectors = CachedDataset(network, read_own(site, study, network, ledger).dataset)
    vectors.warm()  # kept for both fits
    began = time.monotonic()
    made = personalise(run, site)
    seconds = round(time.monotonic() - began, 1)
    _, _, alone = train(public, site, ledger)
    table = EvaluationTable.model_validate(
        {"path": held, "columns": site.data.columns.model_copy(update={"patient": None}),
         "metric": "accuracy"}
    )  # fmt: skip
    evaluator, shared = evaluator_of(run, table)
    start = pick_arrays(public.adapter(), shared, run.folder)
    own = shared
    if made.file is not None:
        own = pick_arrays(open_personal(run, site).adapter(), shared, run.folder)
    arms = {"start": start, "shared": shared, "alone": alone or start, "personal": own}
    scores = {name: evaluator.scores(arrays) for name, arrays in arms.items()}
    right = {name: (one.chosen == one.gold).astype(float) for name, one in scores.items()}
    target = site.data.columns.label or ""
    rows = [r for r in read_rows(held) if str(r[target]).strip() in study.objective.labels]
    assert len(rows) == len(evaluator), "every held-out record of a known class is read"
    units = np.array([str(row[unit]) if unit else str(n) for n, row in enumerate(rows)])
    return {
        "train": made.records,
        "records": len(rows),
        "kept": "personal" if made.file else "shared",
        "way": vars(made.choice.way),
        "least": round(made.choice.least, 4),
        "accuracy": {name: round(float(one.mean()), 4) for name, one in right.items()},
        "loss": {name: round(float(one.loss.mean()), 4) for name, one in scores.items()},
        "over_shared": paired(right["personal"] - right["shared"], units),
        "over_alone": paired(right["personal"] - right["alone"], units),
        "seconds": seconds,
    }


def paired(change: Any, units: Any) -> list[float]:
    """The mean change a record, and its standard error over units, whose records may agree."""
    _, unit = np.unique(units, return_inverse=True)
    sums, count = np.bincount(unit, change - change.mean()), int(unit.max()) + 1
    error = math.sqrt((sums**2).sum() * count / max(1, count - 1)) / len(change)
    return [round(float(change.mean()), 4), round(error, 4)]


def run_seed(name: str, data: Path, seed: int, out: Path, done: set[int]) -> Iterable[Table]:
    """Run one study from its files, unless that was done, and measure at each site not in
    `done`."""
    folder = out / "study"
    if not (out / "run" / "signature.json").exists():
        folder = prepared(name, data, seed, out)
        simulate(load_study(folder / "study.toml"), load_sites(folder / "sites"), out / "run")
    run = Run(out / "run")
    for number, site in enumerate(load_sites(folder / "sites"), 1):
        if number in done:
            continue
        held = site.data.path.with_name(f"held{site.data.path.suffix}")
        about = {"set": name, "seed": seed, "site": number}
        yield about | measured(run, site, held, STRANGERS[name].unit)


TITLES = {"mts_sections": "MTS-Dialog, Dirichlet 0.3", "aci_sections": "ACI-Bench"}
ARMS = ("start", "shared", "alone", "personal")


def table(lines: Iterable[Table]) -> str:
    """Markdown: a row for each site, in the mean of its seeds, and one for each set."""
    head = (
        "| set, site | records: train, test | public start | shared | alone | **personal** "
        "| personal minus shared (95 %) | minus alone (95 %) |"
    )
    told = [head, "|---|---|---|---|---|---|---|---|"]
    by_set: dict[str, dict[int, list[Table]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        by_set[line["set"]][line["site"]].append(line)
    for name, sites in by_set.items():
        told += [_row(f"{TITLES[name]}, site {n}", [sites[n]]) for n in sorted(sites)]
        told.append(_row(f"**{TITLES[name]}, mean**", list(sites.values())))
    return "\n".join(told) + "\n"


def _row(title: str, sites: list[list[Table]]) -> str:
    """One row: means over sites of the means over seeds; errors add up as independent ones do."""
    lines = [line for site in sites for line in site]
    sizes = [round(float(np.mean([line[key] for line in lines]))) for key in ("train", "records")]
    means = [f"{np.mean([line['accuracy'][arm] for line in lines]):.3f}" for arm in ARMS]
    means[-1] = f"**{means[-1]}**"
    changes = [f"{low:+.3f} ± {half:.3f}" for low, half in (
        change(lines, key) for key in ("over_shared", "over_alone"))]  # fmt: skip
    cells = (title, f"{sizes[0]}, {sizes[1]}", *means, *changes)
    return f"| {' | '.join(cells)} |".replace("-0.", "−0.")


def change(lines: list[Table], key: str) -> tuple[float, float]:
    """The mean change over sites and seeds, and half of its 95 % interval."""
    changes, errors = np.array([line[key] for line in lines]).T
    return float(changes.mean()), 1.96 * math.sqrt((errors**2).sum()) / len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "personal.jsonl"
    lines = read_jsonl(file) if file.exists() else []
    for seed in args.seeds:
        for name in args.sets:
            done = {x["site"] for x in lines if (x["set"], x["seed"]) == (name, seed)}
            if len(done) == SETS[name]:
                continue
            folder = args.out.resolve() / f"{name}-{seed}"
            for line in run_seed(name, args.data, seed, folder, done):
                lines.append(line)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(line) + "\n")
                (args.out / "table.md").write_text(table(lines), encoding="utf-8")
                print(f"{name}, seed {seed}, site {line['site']}: {line['accuracy']}", flush=True)


if __name__ == "__main__":
    main()
