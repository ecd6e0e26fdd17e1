"""Write the pictures that explain into a folder: python -m benchmarks.diagrams --out docs/images"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedtune.evidence.dossier.diagrams import PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    folder = parser.parse_args().out
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
