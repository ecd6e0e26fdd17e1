"""Measure how often an acceptance finds a group that is worse, and one where none is.

    OMP_NUM_THREADS=1 python -m benchmarks.acceptance [--seeds 50] [--nulls 400]

No model is trained: scores are drawn, and judged by the code that judges a model's. 400 patients
in five classes stand in two columns, one of two groups and one of four, of 200, 152, 40 and 8.
`found`: the labels of the 40 are shuffled among themselves, and their difference from all others
excludes none; `small`: the 8 are not resolved; `alarms`: nothing is shuffled, and any group of any
column is called different in any measure."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from fedtune.core.config import AcceptanceTable
from fedtune.officer.acceptance.judgement import Judgement, judge
from fedtune.report.scores import Scores

CLASSES = ("a", "b", "c", "d", "e")
WARDS = {"north": 200, "south": 152, "west": 40, "east": 8}
SHUFFLED, FEW = "west", "east"
SKILLS = {0.64: 1.1, 0.83: 1.8, 0.97: 3.0}  # accuracy -> by how much the right class stands out


class Planted(NamedTuple):
    """Scores, whose record each is, and the columns of groups."""

    scores: Scores
    units: np.ndarray
    groups: dict[str, list[str]]


def planted(seed: int, skill: float = 1.8, records: int = 1, *, shuffled: bool = True) -> Planted:
    """Draw a model's scores of so many records a patient; a patient's share how hard they are."""
    random = np.random.default_rng(seed)
    patients = sum(WARDS.values())
    units = np.repeat(np.arange(patients), records)
    n = len(units)
    gold = random.integers(0, len(CLASSES), n)
    logits = random.normal(size=(n, len(CLASSES)))
    logits[np.arange(n), gold] += skill + (0.5 * random.normal(size=patients))[units]
    wards = random.permutation(np.repeat(list(WARDS), list(WARDS.values())))[units]
    sexes = random.permutation(np.repeat(["f", "m"], patients // 2))[units]
    if shuffled:
        own = np.flatnonzero(wards == SHUFFLED)
        gold[own] = random.permutation(gold[own])
    shares = np.exp(logits)
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = shares.argmax(axis=1)
    scores = Scores(
        loss=-np.log(shares[np.arange(n), gold]),
        tokens=np.ones(n),
        exact=chosen == gold,
        chosen=chosen,
        gold=gold,
        margin=np.zeros(n),
        confidence=shares.max(axis=1),
    )
    return Planted(scores, units, {"ward": wards.tolist(), "sex": sexes.tolist()})


def judged(of: Planted, *measures: str) -> Judgement:
    """Judge by these measures, at thresholds that play no part here."""
    table = AcceptanceTable.model_validate(
        {
            "path": "none.csv",
            "columns": {"text": "text", "label": "label", "patient": "patient"},
            "groups": ["ward", "sex"],
            "thresholds": dict.fromkeys(measures or ("accuracy", "loss", "ece", "f1"), 0.5),
        },
        strict=False,
    )
    return judge(table, *of, CLASSES)


def found(judgement: Judgement) -> bool:
    return any(c.found and c.worse for c in judgement.compared if c.value == SHUFFLED)


def unresolved(judgement: Judgement) -> bool:
    return all(c.found is None for c in judgement.compared if c.value == FEW)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--nulls", type=int, default=400)
    arguments = parser.parse_args()
    print("| accuracy | records a patient | found | small not resolved | false alarms |")
    print("|---|---|---|---|---|")
    for accuracy, skill in SKILLS.items():
        for records in (1, 4):
            seeds = range(arguments.seeds)
            told = [judged(planted(seed, skill, records)) for seed in seeds]
            nulls = range(10_000, 10_000 + arguments.nulls)
            alarms = [judged(planted(seed, skill, records, shuffled=False)) for seed in nulls]
            print(
                f"| {accuracy} | {records} | {sum(map(found, told))} of {len(told)} "
                f"| {sum(map(unresolved, told))} of {len(told)} "
                f"| {sum(bool(one.different) for one in alarms)} of {len(alarms)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
