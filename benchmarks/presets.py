"""What `fedtune init --task` gives strangers: their files, three sites, no edit but names.

    python -m benchmarks.presets --data DATA --seeds 0 1 2 --out runs/presets
    python -m benchmarks.presets --data DATA --sets vqa_rad --off --out runs/presets

Each set is written as CSV, JSON Lines or Parquet, as somebody would have it; a seed draws which
units are whose, and which are public. `--off` runs the same plan without noise in its place,
`--pooled` a classifier's best head on all records together, not private. Writes OUT/results.json
and OUT/table.md after every run; what is in results.json is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

from examples.preference import formulary
from examples.write import Table, jsonl, read_jsonl
from fedtune import load_sites, load_study, simulate
from fedtune.core.config import Study
from fedtune.core.registry import process_cache
from fedtune.evaluation.evaluator import Evaluator
from fedtune.presets import Records, write
from fedtune.public import training as public_start
from fedtune.public.start import start
from fedtune.server.step import replace_evaluation

SITES = 3
ARMS = ("preset", "off", "pooled")
PENALTIES = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
Rows = list[Table]


@dataclass(frozen=True)
class Stranger:
    """A set as files. unit: the column that says whose record it is, None: each its own; sizes:
    units of a site, and public ones; kind: the files' suffix; columns: init's options; by_site:
    the column that says which site a unit is at."""

    task: str
    read: Callable[[Path, int], Rows]
    sizes: tuple[int, int]
    kind: str
    columns: dict[str, str]
    unit: str | None = None
    by_site: str | None = None


def _file(name: str) -> Callable[[Path, int], Rows]:
    return lambda data, _: read_jsonl(data / name / "train.jsonl")


def _closed(data: Path, _: int) -> Rows:
    """VQA-RAD's questions that yes or no answers."""
    rows = read_jsonl(data / "vqa_rad" / "train.jsonl")
    rows = [row | {"answer": row["answer"].strip().lower()} for row in rows]
    return [r for r in rows if r["answer_type"] == "CLOSED" and r["answer"] in ("yes", "no")]


def _aci(data: Path, _: int) -> Rows:
    """ACI-Bench's notes section by section, without the headings, which say which it is."""
    rows = []
    for note in read_jsonl(data / "aci_bench" / "train.jsonl"):
        for section, text in note["sections"].items():
            lines = (line for line in text.splitlines() if not line.isupper())
            if text := " ".join(" ".join(lines).split()):
                about = {"patient_id": note["patient_id"], "site": note["site"]}
                rows.append(about | {"text": text, "section": section})
    return rows


STRANGERS = {
    "mts_sections": Stranger(
        "classify", _file("mts_dialog"), (366, 401), ".csv",
        {"prompt": "dialogue", "target": "section"},
    ),
    "aci_sections": Stranger(
        "classify", _aci, (40, 43), ".parquet", {"prompt": "text", "target": "section"},
        unit="patient_id", by_site="site",
    ),
    "medquad": Stranger(
        "answer", _file("medquad"), (100, 150), ".jsonl",
        {"prompt": "question", "target": "answer"}, unit="doc_id",
    ),
    "fsdd": Stranger(
        "speech", _file("fsdd_speech"), (40, 80), ".jsonl", {"media": "audio", "target": "text"}
    ),
    "vqa_rad": Stranger(
        "vision", _closed, (50, 80), ".parquet",
        {"media": "image", "prompt": "question", "target": "answer"},
        unit="patient_id", by_site="site",
    ),
    "mts_preference": Stranger(
        "preference", _file("mts_preference"), (13, 16), ".csv",
        {"prompt": "prompt", "target": "chosen", "rejected": "rejected"}, unit="unit",
    ),
    "formulary": Stranger(
        "preference", lambda _, seed: formulary.pairs(800, f"stranger:{seed}"), (200, 200), ".csv",
        {"prompt": "prompt", "target": "chosen", "rejected": "rejected"},
    ),
    "mts_summaries": Stranger(
        "instruct", _file("mts_dialog"), (80, 80), ".csv",
        {"prompt": "dialogue", "target": "section_text"},
    ),
}  # fmt: skip


def divided(rows: Rows, stranger: Stranger, seed: int) -> tuple[list[Rows], Rows]:
    """Each site's rows, and the public ones; no unit is on two sides."""
    units: dict[Any, Rows] = defaultdict(list)
    for number, row in enumerate(rows):
        units[row[stranger.unit] if stranger.unit else number].append(row)
    names = sorted(units)
    random.Random(f"stranger:{seed}").shuffle(names)
    size, public = stranger.sizes
    open_, others = names[:public], names[public:]
    if place := stranger.by_site:  # a site has the units that are its own
        at: dict[str, list[Any]] = defaultdict(list)
        for name in others:
            at[units[name][0][place]].append(name)
        own = [at[site] for site in sorted(at)]
    else:
        own = [others[n * size : (n + 1) * size] for n in range(SITES)]
    flat = lambda chosen: [row for name in chosen for row in units[name]]  # noqa: E731
    return [flat(each) for each in own], flat(open_)


def saved(rows: Rows, path: Path, media: Path | None) -> Path:
    """The rows as a stranger has them, with the folder of their images or recordings beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    if media:
        shutil.copytree(media, path.parent / media.name, dirs_exist_ok=True)
    return path


def prepared(name: str, data: Path, seed: int, out: Path) -> Path:
    """What `fedtune init --task` writes for the set; the folder."""
    stranger = STRANGERS[name]
    sites, public = divided(stranger.read(data, seed), stranger, seed)
    folder = {"fsdd": "fsdd_speech/wav", "vqa_rad": "vqa_rad/images"}.get(name)
    media = data / folder if folder else None
    shutil.rmtree(out, ignore_errors=True)
    files = [
        saved(rows, out / f"site-{n}" / f"records{stranger.kind}", media)
        for n, rows in enumerate(sites, 1)
    ]
    asked = Records(
        **stranger.columns,  # type: ignore[arg-type]
        patient=stranger.unit,
        data=tuple(files),
        evaluation=saved(public, out / "public" / f"public{stranger.kind}", media),
        size=stranger.sizes[0],
    )
    write(out / "study", stranger.task, asked)
    return out / "study"


def run(name: str, data: Path, seed: int, out: Path, off: bool) -> Table:
    """One study from a stranger's files to its report's figures."""
    started = time.monotonic()
    folder = prepared(name, data, seed, out)
    study, sites = load_study(folder / "study.toml"), load_sites(folder / "sites")
    if off:
        study = without_noise(study)
        sites = [site.changed(policy={"allow_privacy_off": True}) for site in sites]
    quality = simulate(study, sites, out / "run").report["quality"]
    minutes = round((time.monotonic() - started) / 60, 1)
    return {key: quality[key] for key in ("metric", "before", "start", "after", "gain", "selection")
            if key in quality} | {"minutes": minutes}  # fmt: skip


def pooled(name: str, data: Path, seed: int, out: Path) -> Table:
    """The head's regression on the records of all sites and the public ones, whose penalty the
    selection records choose: what the same encoder gives without sites and privacy."""
    started = time.monotonic()
    folder = prepared(name, data, seed, out)
    study, files = load_study(folder / "study.toml"), [*out.glob("site-*/records*")]
    assert study.public and study.selection and study.evaluation
    columns = [STRANGERS[name].columns[key] for key in ("prompt", "target")]
    rows = [row for path in (*files, study.public.path) for row in read_rows(path)]
    rows = [row for row in rows if str(row[columns[1]]).strip() in study.objective.labels]
    every = jsonl(out / "every.jsonl", ({key: row[key] for key in columns} for row in rows))
    study = study.changed(public={"path": every})
    heads = []
    for penalty in PENALTIES:
        process_cache.clear("made from public text")
        with patch.object(public_start, "PENALTY", penalty):
            head = start(study).adapter
        heads.append(
            (Evaluator(replace_evaluation(study), {}).measure(head)["loss"], penalty, head)
        )
    _, penalty, head = min(heads, key=lambda each: each[0])
    after = Evaluator(study, {}).measure(head)
    counted = {"gain": {"records": len(read_jsonl(study.evaluation.path))}}
    minutes = round((time.monotonic() - started) / 60, 1)
    return {"metric": "accuracy", "after": after, "penalty": penalty, "minutes": minutes} | counted


def read_rows(path: Path) -> Rows:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    read = pd.read_parquet if path.suffix == ".parquet" else partial(pd.read_csv, dtype=str)
    return [dict(row) for row in read(path).to_dict("records")]


def without_noise(study: Study) -> Study:
    assert study.clipping and not isinstance(study.privacy, str)
    unit = study.privacy.unit
    return study.changed(privacy="off", clipping={"unit": unit})


def table(results: dict[str, dict[str, Table]]) -> str:
    """Markdown: a row for each set and metric, its figures by seed."""
    lines = ["| set | arm | metric | base | start | after | n | change from the start | min |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in results.items():
        for arm in ARMS:
            mine = [row for key, row in sorted(runs.items()) if key.startswith(arm)]
            for metric in dict.fromkeys([mine[0]["metric"], "loss"] if mine else []):
                base, start, after = (
                    ", ".join(f"{row[key][metric]:.3f}" for row in mine if key in row)
                    for key in ("before", "start", "after")
                )
                change = "; ".join(
                    f"{low:+.3g} to {high:+.3g}"
                    for low, high in (row["gain"].get("over_start", (0, 0)) for row in mine)
                )
                counts = ", ".join(str(row["gain"]["records"]) for row in mine)
                took = max(row["minutes"] for row in mine)
                told = change if metric == mine[0]["metric"] else ""
                cells = (name, arm, metric, base, start, after, counts, told, f"{took:g}")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--sets", nargs="+", choices=list(STRANGERS), default=list(STRANGERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--off", action="store_true", help="the plans without noise")
    other.add_argument("--pooled", action="store_true", help="all records together, not private")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, dict[str, Table]] = json.loads(file.read_text()) if file.exists() else {}
    for name in args.sets:
        for seed in args.seeds:
            arm = f"{'off' if args.off else 'pooled' if args.pooled else 'preset'}-{seed}"
            if arm in results.setdefault(name, {}):
                continue
            given = (name, args.data, seed, args.out.resolve() / f"{name}-{arm}")
            row = pooled(*given) if args.pooled else run(*given, args.off)
            results[name][arm] = row
            print(f"{name}, {arm}: {json.dumps(row)}", flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (args.out / "table.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
