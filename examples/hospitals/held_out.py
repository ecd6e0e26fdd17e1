"""Hold patients of the demo's hospitals out of training, and query them privately after the last
round.

python -m examples.hospitals.held_out --out DIR [--patients 30] [--sigma 2]

Each hospital keeps the given number of patients in a file of its own, about which the plan may ask.
The last line of output is JSON: the answer, the standard deviation of its noise, the held-out
patients' ε, and the same answer without noise, which a coordinator could not compute."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from examples.write import Table, jsonl, read_jsonl
from fedtune import load_sites, load_study, simulate
from fedtune.core.config import DataFile
from fedtune.demo import write
from fedtune.runs.run import Run


def hold_back(folder: Path, patients: int, sigma: float) -> Path:
    """Write the demo under `folder` with `patients` patients held out at each hospital; return the
    path of the plan. sigma: private_evaluation.noise_multiplier."""
    plan = write(folder)
    table = f"\n[private_evaluation]\nnoise_multiplier = {sigma}\nevery = 1000\n"
    plan.write_text(plan.read_text(encoding="utf-8") + table, encoding="utf-8")
    for site in sorted((folder / "sites").iterdir()):
        rows = read_jsonl(site / "notes.jsonl")
        held = sorted({row["patient"] for row in rows})[:patients]
        jsonl(site / "held-out.jsonl", (row for row in rows if row["patient"] in held))
        jsonl(site / "notes.jsonl", (row for row in rows if row["patient"] not in held))
        file = site / "site.toml"
        text = file.read_text(encoding="utf-8").replace(
            "[policy]\n",
            '[evaluation]\npath = "held-out.jsonl"\ndisjoint_from = ["records"]\n'
            '[evaluation.columns]\nprompt = "note"\ncompletion = "desk"\npatient = "patient"\n\n'
            '[policy]\nrelease = ["evaluation"]\n',
        )
        file.write_text(text, encoding="utf-8")
    return plan


def without_noise(run: Run, folder: Path) -> float:
    """Compute the sites' pooled answer without noise: the mean over patients of the mean likelihood
    of their notes' answers."""
    from fedtune.core.config import EvaluationTable
    from fedtune.core.models.adapter_files import pick_arrays
    from fedtune.evaluation.evaluator import Evaluator

    saved, means = run.adapter(), []
    frozen = {name: value for name, value in saved.items() if "lora_A" in name}
    lora = run.study.lora
    assert lora is not None
    for file in sorted(folder.glob("sites/*/held-out.jsonl")):
        columns = DataFile.model_validate(
            {"path": file, "columns": {"prompt": "note", "completion": "desk"}}
        ).columns
        table = EvaluationTable(path=file, columns=columns)
        shape = lora.model_copy(update={"a_init": "public", "a_digest": None})
        evaluator = Evaluator(
            run.study.model_copy(update={"evaluation": table, "lora": shape}), frozen
        )
        adapter = pick_arrays(saved, evaluator.network.parameters(), run.folder / "adapter")
        losses = evaluator.scores(adapter).loss
        by_patient = defaultdict[str, list[float]](list)
        for row, loss in zip(read_jsonl(file), losses, strict=True):
            by_patient[row["patient"]].append(math.exp(-loss))
        means += [sum(values) / len(values) for values in by_patient.values()]
    return sum(means) / len(means)


def run(out: Path, patients: int, sigma: float, rounds: int | None = None) -> dict[str, Any]:
    """Run the study under `out`, and return the figures of the last line."""
    plan = hold_back(out / "data", patients, sigma)
    changes: Table = {} if rounds is None else {"training": {"rounds": rounds}}
    study, sites = load_study(plan).changed(**changes), load_sites(out / "data" / "sites")
    finished = simulate(study, sites, out / "run")
    answer = finished.report["rounds"][-1]["private_quality"]
    return {
        "held out at each hospital": patients,
        "answer": answer["likelihood"],
        "noise_sd": answer["noise_sd"],
        "without noise": without_noise(finished, out / "data"),
        "epsilon": finished.report["privacy"]["evaluation"]["epsilon"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/held-out"), help="a new folder")
    parser.add_argument("--patients", type=int, default=30, help="held out at each hospital")
    parser.add_argument("--sigma", type=float, default=2.0, help="noise of an answer")
    parser.add_argument("--rounds", type=int, help="fewer rounds, to try it")
    chosen = parser.parse_args()
    print(json.dumps(run(chosen.out, chosen.patients, chosen.sigma, chosen.rounds)))


if __name__ == "__main__":
    main()
