"""The demo over several seeds: other patients, other letters, other noise.

    python -m benchmarks.demo --seeds 0 1 2 --out runs/demo-seeds

Each seed: base, each hospital alone, together at ε = 8, 3 and 1, without noise, and with the
adapter's frozen factor drawn from a seed. Writes OUT/table.md and OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from benchmarks import measure
from fedtune import load_sites, load_study, run_demo, simulate

Changes = dict[str, Any]  # of a study or a site, as Table.changed takes them

ARMS: dict[str, Changes] = {
    "ε = 3": {"privacy": {"epsilon": 3.0}},
    "ε = 1": {"privacy": {"epsilon": 1.0}},
    "ε = 8, steps of a fixed length": {"selection": None},
    "ε = 8, A from a seed": {"lora": {"a_init": "seed"}},
}
OFF: Changes = {"privacy": "off", "clipping": {"unit": "patient"}}
ROWS = ("base", "one hospital alone, ε = 8", "together, ε = 8")


def one_seed(seed: int, out: Path) -> dict[str, float]:
    """Accuracy on held-out patients, by arm."""
    report = run_demo(out, seed=seed).report
    accuracy = {
        "base": report["quality"]["before"]["accuracy"],
        "one hospital alone, ε = 8": mean(report["alone"].values()),
        "together, ε = 8": report["quality"]["after"]["accuracy"],
        "ε spent": report["privacy"]["epsilon"],
    }
    for name, changes in ARMS.items():
        accuracy[f"together, {name}"] = arm(out, name, changes)
    accuracy["together, not private (σ = 0)"] = arm(out, "off", OFF)
    return accuracy


def arm(out: Path, name: str, changes: Changes, at_site: dict[str, Changes] | None = None) -> float:
    """The demo's study with some values changed; every site with a step log of its own for it, and
    with what `at_site` has for its [site] table."""
    label = "".join(c if c.isalnum() else "-" for c in name)
    study = load_study(out / "data" / "study.toml").changed(**changes)
    sites = []
    for site in load_sites(out / "data" / "sites"):
        site_changes = {"state": site.site.state.with_name(label)} | (at_site or {}).get(
            site.site.name, {}
        )
        sites.append(site.changed(site=site_changes, policy={"allow_privacy_off": True}))
    run = simulate(study, sites, out / label)
    return float(run.report["quality"]["after"]["accuracy"])


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: mean ± sd over seeds, and the 95 % lower bound of the gain over the base."""
    names = dict.fromkeys([*ROWS, *(n for r in results.values() for n in r if n != "ε spent")])
    lines = ["| arm | accuracy, mean ± sd | by seed |", "|---|---|---|"]
    for name in names:
        values = [r[name] for r in results.values() if name in r]
        lines.append(f"| {name} | {measure.mean_sd(values)} | {', '.join(map(_3, values))} |")
    for title, below in (("base", "base"), ("one hospital alone", "one hospital alone, ε = 8")):
        gains = [r["together, ε = 8"] - r[below] for r in results.values()]
        if len(gains) > 1:
            low = mean(gains) - t.ppf(0.95, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
            lines.append(f"\nGain over {title}: {mean(gains):+.3f}, 95 % lower bound {low:+.3f}.")
    worst = max(r["ε spent"] for r in results.values())
    return "\n".join([*lines, f"\nLargest ε of any hospital: {worst:.4f}."]) + "\n"


def _3(value: float) -> str:
    return f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    results: dict[str, Any] = {}
    for seed in chosen.seeds:
        results[str(seed)] = one_seed(seed, chosen.out / f"seed-{seed}")
        (chosen.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (chosen.out / "table.md").write_text(table(results))
        print(seed, results[str(seed)], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
