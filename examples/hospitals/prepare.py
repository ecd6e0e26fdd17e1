"""Write the demo's files, so that people can read and change them.

python -m examples.hospitals.prepare --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedtune.demo import write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hospitals"), help="a folder")
    parser.add_argument("--seed", type=int, default=0, help="other hospitals, other letters")
    chosen = parser.parse_args()
    study = write(chosen.out, chosen.seed)
    print(f"wrote {study} and {study.parent / 'sites'}; next:")
    print(f"  fedtune plan {study} --sites {study.parent / 'sites'}")
    print(f"  fedtune simulate {study} --sites {study.parent / 'sites'}")


if __name__ == "__main__":
    main()
