"""Each site's own model against the released one and against what the site learns alone.

    python -m benchmarks.personal --data DATA --seeds 0 1 2 --out runs/personal
    python -m benchmarks.personal --data DATA --sets mts_sections --seeds 100 --out runs/tuning

The preset of `fedtune init --task classify` at ε = 3, and then `fedtune personalise` at each site.
MTS-Dialog's records are divided over five sites by a Dirichlet draw for each section (0.3, so that
sites differ much); ACI-Bench's patients belong to the programme that wrote their note. A seed draws
who is whose, which units are public, and the third of each site's units that nothing trains on: on
these the models are compared. Alone is the same fit with a pull towards what public records alone
give, so that only the other sites' part is missing. Writes OUT/results.json after every seed; what
is in it is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.presets import STRANGERS, Rows, saved
from examples.write import Table
from fedtune import load_sites, load_study, simulate
from fedtune.presets import Records, write

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
    for n, (train, test) in enumerate(sites, 1):
        files.append(saved(train, out / f"site-{n}" / f"records{stranger.kind}", None))
        saved(test, out / f"site-{n}" / f"held{stranger.kind}", None)
        units = len({row[stranger.unit] for row in train}) if stranger.unit else len(train)
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
