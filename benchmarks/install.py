"""What fedtune and each of its extras bring: packages, megabytes and seconds.

python -m benchmarks.install [--wheel FILE] [EXTRA ...]

Each extra is installed into an environment that has the core: what it adds is the difference. Times
hold for the index and the cache that were at hand, sizes for this machine's build of torch."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = [sys.executable, "-m", "uv"]


def packages(place: Path) -> int:
    return len(list(place.glob("lib/python3*/site-packages/*.dist-info")))


def megabytes(place: Path) -> float:
    """Size on disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder, _, files in os.walk(place):
        for name in files:
            facts = os.lstat(os.path.join(folder, name))
            if (facts.st_dev, facts.st_ino) not in seen:
                seen.add((facts.st_dev, facts.st_ino))
                total += facts.st_size
    return total / 1e6


def install(place: Path, *what: str) -> float:
    """Install with uv, which links from its cache where it can; the seconds that it took.

    From elsewhere than the repository: there uv reads what pyproject.toml says of torch."""
    start = time.monotonic()
    words = [*UV, "pip", "install", "--quiet", "--python", str(place / "bin/python"), *what]
    subprocess.run(words, check=True, cwd=place)
    return time.monotonic() - start


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [e for e in project["optional-dependencies"] if e not in ("dev", "bench")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("extras", nargs="*", default=extras)
    parser.add_argument("--wheel", type=Path, default=ROOT)
    given = parser.parse_args()
    wheel = str(given.wheel.resolve())
    print("| what | packages | MB | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for extra in ("", *given.extras):
            place = Path(folder) / (extra or "core")
            subprocess.run([*UV, "venv", "--quiet", str(place)], check=True)
            steps = {"torch": "torch", "fedtune": wheel}
            if extra:
                steps = {"": wheel, f"[{extra}]": f"{wheel}[{extra}]"}
            for name, what in steps.items():
                before, size = packages(place), megabytes(place)
                seconds = install(place, what)
                count, size = packages(place) - before, megabytes(place) - size
                if name:
                    print(f"| `{name}` | {count} | {size:,.0f} | {seconds:.0f} |", flush=True)
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
