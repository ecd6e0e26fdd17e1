"""Write three hospitals whose desks change during a study: their records before and after the
change, and the study.

    study.toml                    the public plan: a [schedule] and no last round
    sites/<name>/site.toml        one hospital's own file
    sites/<name>/notes.jsonl      its records before the change
    public.jsonl                  unlabelled, for the adapter's frozen factor
    evaluation.jsonl              public notes with the desks as they are before the change
    later/<name>.jsonl            the same records, and those of as many new patients after the
    change later/evaluation.jsonl        the public notes with the desks after the change

The task is the demo's (fedtune/demo): which desk, A to I, must see the patient. At the change, five
of the nine departments move to the desk of another one, so that what the model has learned about
them is wrong. Only the notes of new patients have the new desks; earlier notes keep the old ones.

python -m examples.continuous.prepare --out DIR
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from examples.write import jsonl
from fedtune.core.dp.accountant import calibrate
from fedtune.demo import generate
from fedtune.demo.generate import DESKS, HOSPITALS, NINE, OWN_SHARE, Hospital

LIFE = 8  # rounds that a patient's budget pays for
EPSILON, DELTA = 8.0, 1e-4
MOVED = 5  # the number of departments that change desks
EVALUATED = 297
SCHEDULE = """
[schedule]
every = "1d"
start = "2026-01-05T02:00:00Z"
alpha = 0.05                # the chance of a release that is no better, over all
looks = 16                  # comparisons on the same public records
"""

Desks = dict[str, str]
Rows = list[dict[str, str]]


def write(folder: Path, seed: int = 0, patients: float = 1.0) -> Path:
    """Write all files under `folder`, and return the path of study.toml. patients: the number of
    patients as a multiple of the demo's."""
    rng = random.Random(seed)
    before = dict(zip(NINE, rng.sample(DESKS[:9], 9), strict=True))
    after = moved(before, rng)
    for hospital in HOSPITALS:
        count = round(hospital.patients * patients)
        first_rows = _records(hospital, 1, count, before, rng)
        later = _records(hospital, 1001, count, after, rng)
        site = folder / "sites" / hospital.name
        jsonl(site / "notes.jsonl", first_rows)
        jsonl(folder / "later" / f"{hospital.name}.jsonl", [*first_rows, *later])
        text = generate.SITE.format(name=hospital.name, patients=count)
        (site / "site.toml").write_text(text, encoding="utf-8")
    for place, desks in ((folder, before), (folder / "later", after)):
        jsonl(place / "evaluation.jsonl", _public(desks, random.Random(seed + 1)))
    jsonl(folder / "public.jsonl", generate.public_notes(rng, departments=NINE))
    return _study(folder, seed)


def moved(desks: Desks, rng: random.Random) -> Desks:
    """Return `desks` with MOVED departments, drawn at random, each at the desk of the next one."""
    who = rng.sample(NINE, MOVED)
    return desks | {name: desks[who[(n + 1) % MOVED]] for n, name in enumerate(who)}


def _records(hospital: Hospital, first: int, count: int, desks: Desks, rng: random.Random) -> Rows:
    """Return one note for each of `count` patients, numbered from `first`."""
    rows: Rows = []
    for number in range(first, first + count):
        from_own_departments = rng.random() < OWN_SHARE
        pool = [d for d in NINE if (d in hospital.own) == from_own_departments]
        rows += generate.patient_notes(hospital, number, rng.choice(pool), 1, desks, rng)
    return rows


def _public(desks: Desks, rng: random.Random) -> Rows:
    """Return the public notes with their desks. The notes are the same for all desks."""
    rows: Rows = []
    for i in range(EVALUATED):
        hospital = HOSPITALS[i % len(HOSPITALS)]
        department = NINE[i // len(HOSPITALS) % len(NINE)]
        rows += generate.patient_notes(hospital, 7001 + i, department, 1, desks, rng)
    return rows


def _study(folder: Path, seed: int) -> Path:
    choices = ", ".join(f'" {letter}"' for letter in DESKS[:9])
    text = generate.STUDY.format(seed=seed, choices=choices, selection="", rounds=8)
    sigma = calibrate(EPSILON, DELTA, 1.0, LIFE)
    changes = {
        'name = "hospitals"': 'name = "continuous"',
        "rounds = 8\n": "",
        "epsilon = 8.0\n": f"epsilon = {EPSILON}               # all that one patient ever pays\n"
        f"noise_multiplier = {sigma}   # so that it pays for {LIFE} rounds\n",
        'path = "test.jsonl"': 'path = "evaluation.jsonl"',
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "study.toml"
    path.write_text(text + SCHEDULE, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/continuous"), help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="other hospitals, other letters")
    chosen = parser.parse_args()
    study = write(chosen.out, chosen.seed)
    print(f"wrote {study} and {study.parent / 'sites'}; next:")
    print(f"  fedtune simulate {study} --sites {study.parent / 'sites'} --rounds {LIFE}")


if __name__ == "__main__":
    main()
