"""Write the VQA-RAD study: three sites learn to answer yes or no about radiology images.

    epsilon-8.toml, non-private.toml, local.toml    the public plan, one file for each arm
    sites/<name>/site.toml                          one site's own file
    sites/<name>/train.jsonl, images/               {image, question, answer, patient}
    open/<name>/site.toml                           the same, admitting privacy = "off"
    test.jsonl, blind.jsonl, images/                a quarter of the images; blind: all of them grey
    public.jsonl, drawn/                            PubMedQA's questions beside drawn images

A site is a part of the body (head, chest, abdomen). The set has one image of each patient, so the
unit is the patient; the split is by image, and no image of a test question is at any site.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.write import Table, jsonl, merged, read_jsonl, toml

SITES = {"HEAD": "head", "CHEST": "chest", "ABD": "abdomen"}
DECLARED = 60  # patients a site: three quarters of the public total of 250, over three sites
TEST = 0.25
METRIC = "accuracy"
BASE = Path("base")
COLUMNS: Table = {"image": "image", "prompt": "question", "completion": "answer"}

STUDY: Table = {
    "privacy": None,
    "study": {"name": "vqa-rad", "seed": 0},
    "base": {"model": str(BASE), "dtype": "float32"},
    "lora": {
        "rank": 16,
        "alpha": 32,
        "modules": ["gate_proj", "up_proj", "down_proj"],
        "last_layers": 1,
        "a_init": "public",
    },
    "objective": {
        "name": "causal_lm",
        "max_length": 96,
        "template": "{text}\nAnswer:",
        "append_eos": False,
    },
    "public": {"path": "public.jsonl", "licence": "MIT", "columns": COLUMNS},
    "training": {"rounds": 8, "sampling_rate": 1.0, "learning_rate": 5.0},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "strategy": {"weights": "equal"},
    "evaluation": {
        "path": "test.jsonl",
        "metric": METRIC,
        "columns": COLUMNS,
        "choices": [" yes", " no"],
    },
}


def private(epsilon: float, **tables: Any) -> Table:
    asked = {"epsilon": epsilon, "delta": 1e-3, "unit": "patient", "max_records_per_unit": 8}
    return merged({"privacy": asked}, tables)


ARMS: dict[str, Table] = {
    "non-private": {"privacy": "off", "clipping": {"unit": "patient"}},  # as epsilon-8, σ = 0
    "epsilon-8": private(8.0),
    "local": private(8.0),
}
TUNING: dict[str, list[Table]] = {}


def study(arm: str, seed: int, base: Path = BASE) -> Table:
    tables = merged(STUDY, {"study": {"name": f"vqa-rad-{arm}", "seed": seed}})
    return merged(merged(tables, ARMS[arm]), {"base": {"model": str(base)}})


def write(data: Path, public: Path, out: Path, seed: int, base: Path = BASE) -> list[Path]:
    """Write the study on the questions of data/train.jsonl, and return the paths of the strict site
    files. public: the file of PubMedQA."""
    rng = np.random.default_rng(seed)
    rows = [row for row in read_jsonl(data / "train.jsonl") if _asked(row)]
    patients = sorted({row["patient_id"] for row in rows})
    held = set(rng.choice(patients, round(TEST * len(patients)), replace=False).tolist())
    test = [_taken(row, data, out) for row in rows if row["patient_id"] in held]
    jsonl(out / "test.jsonl", test)
    grey = Image.new("L", (256, 256), 128)
    grey.save(out / "images" / "grey.png")
    jsonl(out / "blind.jsonl", ({**row, "image": "images/grey.png"} for row in test))
    jsonl(out / "public.jsonl", _drawn(public, out / "drawn", rng))
    sites = []
    for part, name in SITES.items():
        mine = [r for r in rows if r["site"] == part and r["patient_id"] not in held]
        place = out / "sites" / name
        jsonl(place / "train.jsonl", [_taken(row, data, place) for row in mine])
        sites.append(_site(out, name))
    for arm in ARMS:
        toml(out / f"{arm}.toml", study(arm, seed, base.resolve()), f"VQA-RAD, arm {arm}")
    return sites


def _asked(row: dict[str, Any]) -> bool:
    """Return whether the row is a closed question with the answer yes or no."""
    return row["answer_type"] == "CLOSED" and row["answer"].strip().lower() in ("yes", "no")


def _taken(row: dict[str, Any], data: Path, to: Path) -> dict[str, Any]:
    """Return the fields of a row that the study uses, after copying its image to `to`."""
    path = to / row["image"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        shutil.copyfile(data / row["image"], path)
    return {
        "image": row["image"],
        "question": row["question"].strip(),
        "answer": " " + row["answer"].strip().lower(),
        "patient": row["patient_id"],
    }


def _drawn(public: Path, folder: Path, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the rows of public.jsonl: 128 questions of PubMedQA, each with a drawn image of
    blurred noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, row in enumerate(read_jsonl(public)[:128]):
        coarse = rng.integers(0, 256, (int(rng.integers(3, 24)),) * 2, dtype=np.uint8)
        name = f"{number}.png"
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(folder / name)
        answer = " yes" if number % 2 else " no"  # arbitrary: only the text before it is used
        image = f"{folder.name}/{name}"
        rows.append({"image": image, "question": row["question"], "answer": answer})
    return rows


def _site(out: Path, name: str) -> Path:
    """Write both site files of one site, and return the path of the strict one."""
    table: Table = {
        "site": {"name": name, "declared_size": DECLARED},
        "data": {"path": "train.jsonl", "columns": {**COLUMNS, "patient": "patient"}},
        "policy": {"max_epsilon": 8.0, "max_delta": 1e-3, "bases": "any"},
    }
    elsewhere = {"data": {"path": f"../../sites/{name}/train.jsonl"}}
    opened = merged(table, {**elsewhere, "policy": {"allow_privacy_off": True}})
    toml(out / "open" / name / "site.toml", opened, f'{name}, admitting privacy = "off"')
    return toml(out / "sites" / name / "site.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder of train.jsonl, images/"
    )
    parser.add_argument("--public", type=Path, required=True, help="PubMedQA's train.jsonl")
    parser.add_argument(
        "--base", type=Path, required=True, help="as examples.vqa_rad.base wrote it"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    args = parser.parse_args()
    sites = write(args.data, args.public, args.out, args.seed, args.base)
    print(f"{len(sites)} sites in {args.out / 'sites'}; plans: {', '.join(ARMS)} (.toml)")


if __name__ == "__main__":
    main()
