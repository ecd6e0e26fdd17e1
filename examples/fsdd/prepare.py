"""Write the FSDD study: four sites, each with one speaker's recordings, learn to recognise the ten
digits.

    epsilon-8.toml, non-private.toml, local.toml    the public plan, one file for each arm
    sites/<name>/site.toml                          one site's own file
    sites/<name>/train.jsonl, wav/                  {audio, said}, and the recordings
    open/<name>/site.toml                           the same, admitting privacy = "off"
    test.jsonl, wav/                                two takes of each digit and speaker, fixed
    validation.jsonl, wav/                          one more, drawn by the seed
    public.jsonl, spoken/                           synthetic speech, for the frozen factor

The unit of privacy is the recording, not the speaker: each site has one speaker, whose identity is
not protected.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from examples.write import Table, jsonl, merged, read_jsonl, toml

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DECLARED = 20  # recordings a site: ten digits, two takes
TEST, VALIDATION = 2, 1  # the number of takes, of five for each digit and speaker
FIRST = 0  # the seed that draws the test takes
METRIC = "accuracy"
BASE = Path("base")
COLUMNS: Table = {"audio": "audio", "text": "said"}
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-us+f3", "en-gb+f2", "en-us+m3")

STUDY: Table = {
    "privacy": None,
    "study": {"name": "fsdd", "seed": 0},
    "base": {"model": str(BASE), "dtype": "float32"},
    "lora": {
        "rank": 8,
        "alpha": 16,
        "modules": ["fc1", "fc2"],
        "last_layers": 1,
        "a_init": "public",
    },
    "objective": {"name": "causal_lm", "max_length": 16, "append_eos": False},
    "public": {"path": "public.jsonl", "licence": "generated", "columns": COLUMNS},
    "training": {"rounds": 8, "sampling_rate": 1.0, "learning_rate": 1.5},
    "clipping": {"max_grad_norm": 1.0, "mode": "normalised"},
    "strategy": {"weights": "equal"},
    "evaluation": {
        "path": "test.jsonl",
        "metric": METRIC,
        "columns": COLUMNS,
        "choices": [f" {digit}" for digit in DIGITS],
    },
}


def private(epsilon: float, **tables: Any) -> Table:
    asked = {"epsilon": epsilon, "delta": 1e-3, "unit": "record"}
    return merged({"privacy": asked}, tables)


# Each rate is the best of TUNING on the validation recordings of seed 0.
ARMS: dict[str, Table] = {
    "non-private": {  # clipped as epsilon-8, σ = 0
        "privacy": "off",
        "clipping": {"unit": "record"},
        "training": {"learning_rate": 5.0},
    },
    "epsilon-8": private(8.0),
    "local": private(8.0),
}
TUNING: dict[str, list[Table]] = {
    arm: [{"training": {"learning_rate": rate}} for rate in (0.5, 1.5, 5.0, 15.0)]
    for arm in ("non-private", "epsilon-8")
}


def study(arm: str, seed: int, base: Path = BASE) -> Table:
    tables = merged(STUDY, {"study": {"name": f"fsdd-{arm}", "seed": seed}})
    return merged(merged(tables, ARMS[arm]), {"base": {"model": str(base)}})


def write(data: Path, out: Path, seed: int, base: Path = BASE) -> list[Path]:
    """Write the study on the recordings that data/train.jsonl lists, and return the paths of the
    strict site files (sites/<name>/site.toml)."""
    rng, first = np.random.default_rng(seed), np.random.default_rng(FIRST)
    takes: defaultdict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in read_jsonl(data / "train.jsonl"):
        takes[row["speaker"], row["label"]].append(row)
    sites, test, validation = [], list[dict[str, Any]](), list[dict[str, Any]]()
    for speaker in sorted({speaker for speaker, _ in takes}):
        mine: list[dict[str, Any]] = []
        for digit in range(10):
            rows = takes[speaker, digit]
            fixed = [rows[at] for at in first.permutation(len(rows))]
            rest = [fixed[TEST:][at] for at in rng.permutation(len(rows) - TEST)]
            test += [_taken(row, data, out) for row in fixed[:TEST]]
            validation += [_taken(row, data, out) for row in rest[:VALIDATION]]
            mine += [_taken(row, data, out / "sites" / speaker) for row in rest[VALIDATION:]]
        jsonl(out / "sites" / speaker / "train.jsonl", mine)
        sites.append(_site(out, speaker))
    jsonl(out / "test.jsonl", test)
    jsonl(out / "validation.jsonl", validation)
    jsonl(out / "public.jsonl", _spoken(out / "spoken"))
    for arm in ARMS:
        toml(out / f"{arm}.toml", study(arm, seed, base.resolve()), f"FSDD, arm {arm}")
    return sites


def _taken(row: dict[str, Any], data: Path, to: Path) -> dict[str, Any]:
    """Return the row with its recording copied beside it."""
    path = to / row["audio"]
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data / row["audio"], path)
    return {"audio": row["audio"], "said": " " + DIGITS[row["label"]]}


def _spoken(folder: Path) -> list[dict[str, Any]]:
    """Synthesise the digits with espeak-ng, whose voices contain no recording of this set, and
    return the rows of public.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, voice in enumerate(VOICES):
        for digit in DIGITS:
            path, speed = folder / f"{digit}-{number}.wav", str(120 + 15 * number)
            say = ["espeak-ng", "-v", voice, "-s", speed, "-w", str(path), digit]
            try:
                subprocess.run(say, check=True, capture_output=True)
            except FileNotFoundError:
                raise SystemExit(
                    "espeak-ng is not installed; apt-get install espeak-ng (or brew)"
                ) from None
            rows.append({"audio": f"{folder.name}/{path.name}", "said": " " + digit})
    return rows


def _site(out: Path, name: str) -> Path:
    """Write both site files of one site; return the path of the strict one."""
    table: Table = {
        "site": {"name": name, "declared_size": DECLARED},
        "data": {"path": "train.jsonl", "columns": COLUMNS},
        "policy": {"max_epsilon": 8.0, "max_delta": 1e-3, "bases": "any"},
    }
    elsewhere = {"data": {"path": f"../../sites/{name}/train.jsonl"}}
    opened = merged(table, {**elsewhere, "policy": {"allow_privacy_off": True}})
    toml(out / "open" / name / "site.toml", opened, f'{name}, admitting privacy = "off"')
    return toml(out / "sites" / name / "site.toml", table, f"{name}'s own file; never sent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of train.jsonl, wav/")
    parser.add_argument("--base", type=Path, required=True, help="as examples.fsdd.base wrote it")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    args = parser.parse_args()
    sites = write(args.data, args.out, args.seed, args.base)
    print(f"{len(sites)} sites in {args.out / 'sites'}; plans: {', '.join(ARMS)} (.toml)")


if __name__ == "__main__":
    main()
