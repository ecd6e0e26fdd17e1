"""Three sites learn which way a disc moves, from generated clips.

    python -m examples.motion.run --out runs/motion --seeds 0 1 2

Each clip has one bright disc that goes one of eight ways; its middle frame is drawn in the same
way for all, so that no single frame shows which. Each site releases its class statistics
once. The base's tower was never trained: random features. *Middle frame alone* is the same study on
clips of that frame, shown for as long, with the first seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.write import Table, jsonl, merged, toml
from fedtune import load_sites, load_study, simulate

WAYS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
SITES, DECLARED = ("north", "east", "south"), 100  # clips a site
PUBLIC, TEST = 40, 160
SIDE, FRAMES, DISC = 128, 16, 20  # pixels, frames, pixels of the radius
START = "public clips alone"
DISTANCE = (50.0, 80.0)  # pixels, from the first frame to the last
COLUMNS: Table = {"video": "video", "label": "way"}

STUDY: Table = {
    "privacy": None,
    "study": {"name": "motion", "seed": 0},
    "base": {"model": "pypi:smol-vision", "dtype": "float32", "modality": "video_text"},
    "objective": {
        "name": "prototypes",
        "max_length": 256,
        "labels": [*WAYS],
        "options": {"directions": 32, "count_weight": 0.5},
    },
    "start": {"head": "public"},
    "public": {"path": "public.jsonl", "licence": "generated", "columns": COLUMNS},
    "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.1181},
    "strategy": {"name": "discriminant"},
    "wire": {"update": "float32"},
    "evaluation": {"path": "test.jsonl", "metric": "accuracy", "columns": COLUMNS},
}
ON: Table = {"privacy": {"epsilon": 8.0, "delta": 1e-3, "unit": "record"}}
OFF: Table = {"privacy": "off", "clipping": {"unit": "record"}}
ARMS = {"one release, ε = 8": ON, "one release, σ = 0": OFF}


def frames(way: str, draw: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a clip, (FRAMES, SIDE, SIDE, 3)."""
    middle = draw.uniform(0.3 * SIDE, 0.7 * SIDE, 2)
    distance, angle = draw.uniform(*DISTANCE), 2 * np.pi * WAYS.index(way) / len(WAYS)
    bright, dark = draw.integers(160, 256, 3), draw.integers(0, 60, 3)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    shown = []
    for time in np.linspace(-0.5, 0.5, FRAMES):
        row, column = middle + distance * time * np.array([np.sin(angle), np.cos(angle)])
        inside = (rows - row) ** 2 + (columns - column) ** 2 < DISC**2
        shown.append(np.where(inside[..., None], bright, dark))
    return np.array(shown, np.uint8)


def record(path: Path, shown: npt.NDArray[np.uint8]) -> None:
    """Write a clip as H.264 in MP4, as cameras do."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for picture in shown:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(stream.encode())


def write(out: Path, seed: int, still: bool = False) -> None:
    """Write the records of public, test and sites, with the sites' files and the plans."""
    draw = np.random.default_rng(seed)
    for place, count in {"public": PUBLIC, "test": TEST, **dict.fromkeys(SITES, DECLARED)}.items():
        folder = out / "sites" / place if place in SITES else out
        rows = []
        for number in range(count):
            way = WAYS[number % len(WAYS)]
            shown = frames(way, draw)
            name = f"{place}/{number}.mp4"
            record(folder / name, shown[[FRAMES // 2] * FRAMES] if still else shown)
            rows.append({"video": name, "way": way})
        jsonl(folder / f"{place}.jsonl", rows)
        if place in SITES:
            site: Table = {
                "site": {"name": place, "declared_size": DECLARED},
                "data": {"path": f"{place}.jsonl", "columns": COLUMNS},
                "policy": {"max_epsilon": 8.0, "max_delta": 1e-3, "allow_privacy_off": True},
            }
            toml(folder / "site.toml", site, f"{place}'s own file")
    for number, tables in enumerate(ARMS.values()):
        plan = merged(merged(STUDY, {"study": {"name": f"motion-{number}", "seed": seed}}), tables)
        toml(out / f"{number}.toml", plan, "which of eight ways a disc moves")


def measure(out: Path, seed: int, still: bool = False) -> Table:
    """Run every arm that is missing in `out`, and return their accuracies, and that of public
    records alone."""
    if not (out / "0.toml").exists():
        write(out, seed, still)
    found: Table = {}
    for number, arm in enumerate(ARMS):
        run = out / f"run-{number}"
        if not (run / "report.json").exists():
            simulate(load_study(out / f"{number}.toml"), load_sites(out / "sites"), run)
        quality = json.loads((run / "report.json").read_text(encoding="utf-8"))["quality"]
        found[arm] = quality["after"]["accuracy"]
        found[START] = quality["start"]["accuracy"]
    return found


def table(rows: list[Table], still: Table) -> str:
    """Markdown: accuracies by seed, of the clips and of their middle frames alone."""
    lines = ["| arm | accuracy, by seed | mean | middle frame alone |", "|---|---|---|---|"]
    for arm in (START, *ARMS):
        each = [row[arm] for row in rows]
        figures = ", ".join(f"{value:.3f}" for value in each)
        lines.append(f"| {arm} | {figures} | {np.mean(each):.3f} | {still[arm]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/motion"), help="the folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    moving = [measure(chosen.out / f"moving-{seed}", seed) for seed in chosen.seeds]
    first = chosen.seeds[0]
    print(table(moving, measure(chosen.out / f"still-{first}", first, still=True)))


if __name__ == "__main__":
    main()
