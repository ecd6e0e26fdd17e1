"""Ask releases of Flower whether they keep what fedtune needs of them (test_contract.py).

    python -m tests.flower.releases [--whole] [VERSION…]

Without versions: every release from FIRST to the newest that the package index has, and its newest
nightly, which shows a change before it is released. Each is put into a folder of its own below
build/flower, with what it requires that is not installed here, and comes first on the path. --whole
also runs a consortium from nothing over loopback with each. Exit code 1 if a release breaks the
contract; a nightly that does is only told."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FIRST = Version("1.40.0")
FOLDER = ROOT / "build" / "flower"
CONTRACT = ("tests/flower/test_contract.py", "tests/flower/test_control.py")
WHOLE = "tests/network/test_from_nothing.py"
USED = "FEDTUNE_FLOWER"  # the folder of the release that must be in use
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def index_versions(project: str, *options: str) -> list[str]:
    """The versions of a project that the index has, newest first."""
    asked = [*PIP, "index", "versions", project, *options]
    said = subprocess.run(asked, capture_output=True, text=True, check=True)
    found = re.search(r"Available versions: (.+)", said.stdout)
    return found[1].split(", ") if found else []


def releases() -> list[str]:
    """flwr==VERSION of each release since FIRST, oldest first, and the newest nightly."""
    since = [one for one in map(Version, index_versions("flwr")) if one >= FIRST]
    nightly = index_versions("flwr-nightly", "--pre")[:1]
    newer = [one for one in nightly if Version(one) > max(since)]
    return [f"flwr=={one}" for one in sorted(since)] + [f"flwr-nightly=={one}" for one in newer]


def install(release: str) -> Path:
    """Install a release without what it requires, and then what of that is not here already."""
    target = FOLDER / release.replace("==", "-")
    if not target.exists():
        draft = target.with_name(f"{target.name}.new")
        into = [*PIP, "install", "-qq", "--upgrade", "--target", draft]
        subprocess.run([*into, "--no-deps", release], check=True)
        if lacking := unmet(draft):
            subprocess.run([*into, *lacking], check=True)
        draft.rename(target)
    return target


def unmet(target: Path) -> list[str]:
    """What the release in a folder requires and this environment does not have."""
    (metadata,) = target.glob("flwr*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    return [line for line in lines if not _is_met(Requirement(line))]


def _is_met(wanted: Requirement) -> bool:
    if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
        return True
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def ask(release: str, *, whole: bool) -> tuple[bool, str]:
    """Run the contract with a release; whether it holds, and pytest's last line."""
    path = install(release)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CONTRACT]
    command += [WHOLE] if whole else []
    here = os.environ | {"PYTHONPATH": str(path), USED: str(path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True)
    lines = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return ran.returncode == 0, "\n".join([*lines, *ran.stdout.splitlines()[-1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask releases of Flower for what fedtune needs.")
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--whole", action="store_true", help="also a consortium from nothing")
    given = parser.parse_args()
    asked = [f"flwr=={one}" for one in given.versions] or releases()
    broken = 0
    for release in asked:
        holds, said = ask(release, whole=given.whole)
        nightly = release.startswith("flwr-nightly")
        broken += not (holds or nightly)
        print(f"{release}: {'holds' if holds else 'BREAKS'}\n{said}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
