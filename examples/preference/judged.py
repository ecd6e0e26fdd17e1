"""Split a prepared set's pairs into single judgements, and write a plan of objective `kto`.

    kto-epsilon-8.toml           the public plan; its evaluation records are the pairs of test.jsonl
    judged/<name>/judged.jsonl   {unit, prompt, completion, desirable}, two rows of each pair
    judged/<name>/site.toml      the site's own file; the same budget as its pairs'

The better answer of a pair is desirable, the other is not. The unit of privacy is a dialogue, as
for pairs; if it is the record, it becomes one judgement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.preference import prepare
from examples.write import Table, jsonl, merged, read_jsonl, toml

RATE = 1.0  # at 3 and 30 the formulary's better answers lost likelihood (docs/preference.md)
COLUMNS = {"prompt": "prompt", "completion": "completion", "label": "desirable"}


def judgements(pairs: list[Table]) -> list[Table]:
    """Return two judged answers for each pair."""
    return [
        {"unit": pair["unit"], "prompt": pair["prompt"], "completion": pair[key], "desirable": good}
        for pair in pairs
        for key, good in (("chosen", True), ("rejected", False))
    ]


def study(name: str, seed: int = 0, epsilon: float = 8.0) -> Table:
    """Return the plan as tables: DPO's of this set, with objective kto and a rate of its own."""
    source = prepare.SOURCES[name]
    as_dpo = prepare.study(name, "dpo", "epsilon-8", seed)
    del as_dpo["objective"]["name"]
    as_dpo["objective"].pop("options", None)
    return merged(
        as_dpo,
        {
            "study": {"name": f"preference-kto-{name}"},
            "objective": {"name": "kto", "options": {"beta": 0.1}},
            "training": {"learning_rate": RATE},
            "privacy": {"epsilon": epsilon, "delta": source.delta, "unit": source.unit},
        },
    )


def write(name: str, out: Path, seed: int = 0) -> Path:
    """Write plan and site files beside the pairs in `out`, and return the path of the plan. If the
    unit is the record, a site declares two units for each pair. Errors: OSError if the pairs are
    missing."""
    source = prepare.SOURCES[name]
    twice = 2 if source.unit == "record" else 1
    for site, declared in source.declared.items():
        pairs = read_jsonl(out / "sites" / site / "train.jsonl")
        folder = out / "judged" / site
        jsonl(folder / "judged.jsonl", judgements(pairs))
        patient = {"patient": "unit"} if source.unit == "patient" else {}
        table: Table = {
            "site": {"name": site, "declared_size": twice * declared},
            "data": {
                "path": "judged.jsonl",
                "name": "invented" if source.is_generated else None,
                "declared": "generated" if source.is_generated else None,
                "columns": COLUMNS | patient,
            },
            "policy": {"max_epsilon": 8.0, "max_delta": source.delta},
        }
        toml(folder / "site.toml", table, f"{site}'s own file; never sent")
    plan = out / "kto-epsilon-8.toml"
    toml(plan, study(name, seed), f"{source.title}, kto on single judgements")
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("set", choices=sorted(prepare.SOURCES))
    parser.add_argument("--out", type=Path, required=True, help="a folder that prepare wrote")
    parser.add_argument("--seed", type=int, default=0, help="the plan's (default: 0)")
    args = parser.parse_args()
    plan = write(args.set, args.out, args.seed)
    print(f"wrote {plan}; next: fedtune simulate {plan} --sites {args.out / 'judged'}")


if __name__ == "__main__":
    main()
