"""What is handed out: a wheel and a source archive, the same bytes each time, with all that the
code reads and nothing else; shell completions; the locks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import fedtune

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = ("fedtune", "client", "server", "locks", "docs", "tests/docs")
FILES = ("pyproject.toml", "README.md", "LICENSE", ".gitignore")


def copy_of(folder: Path, when: int, umask: int) -> Path:
    """What is built from, as another clone has it: other times, other modes."""
    before = os.umask(umask)
    try:
        skip = shutil.ignore_patterns("__pycache__")
        for name in SHIPPED:
            shutil.copytree(ROOT / name, folder / name, ignore=skip, copy_function=shutil.copyfile)
        for name in FILES:
            shutil.copyfile(ROOT / name, folder / name)
        for path in folder.rglob("*"):
            os.utime(path, (when, when))
    finally:
        os.umask(before)
    return folder


def build(source: Path, out: Path, epoch: str = "1700000000") -> dict[str, bytes]:
    """The files of a build without a network: name -> bytes."""
    pytest.importorskip("hatchling", reason="hatchling is in the dev extra")
    environment = os.environ | {"SOURCE_DATE_EPOCH": epoch}
    words = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    done = subprocess.run(words, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("built")
    return folder, build(copy_of(folder / "source", 1_600_000_000, 0o022), folder / "dist")


def test_two_builds_give_the_same_bytes(
    built: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    folder, files = built
    assert sorted(name.rsplit(".", 1)[1] for name in files) == ["gz", "whl"]
    again = build(copy_of(tmp_path / "clone", 1_650_000_000, 0o077), tmp_path / "dist")
    assert again == files
    (archive,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    from_archive = build(unpacked, tmp_path / "from-archive")
    wheel = next(name for name in files if name.endswith(".whl"))
    assert from_archive[wheel] == files[wheel]
    other = build(tmp_path / "clone", tmp_path / "later", epoch="1800000000")  # the twin
    assert set(other) == set(files) and all(other[name] != files[name] for name in files)


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(
    built: tuple[Path, dict[str, bytes]],
) -> None:
    (wheel,) = (built[0] / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    at = f"fedtune-{fedtune.__version__}"
    assert {name.split("/")[0] for name in names} == {
        "fedtune", f"{at}.dist-info", f"{at}.data"
    }  # fmt: skip
    assert f"{at}.data/data/share/man/man1/fedtune.1" in names
    for name in ("LICENSE", "fedtune/dashboard/static/LICENSES.md"):
        assert f"{at}.dist-info/licenses/{name}" in names
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fedtune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("fedtune/")} == source
    assert any(not name.endswith((".py", "py.typed")) for name in source)  # data is among it


def test_python_m_fedtune_and_its_completions(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fedtune", "--version"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"fedtune {fedtune.__version__}", done.stderr
    command = tmp_path / "fedtune"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedtune "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(_FEDTUNE_COMPLETE=source_bash fedtune)"\n'
        'COMP_WORDS=(fedtune "$1"); COMP_CWORD=1; _fedtune_completion fedtune\n'
        'echo "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    for typed, offered in (("pur", {"purge"}), ("rev", {"review", "revoke"})):
        done = subprocess.run(
            ["bash", "-c", script, "bash", typed],
            env=environment | {"PATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert set(done.stdout.split()) == offered, done.stderr


def locked(name: str) -> dict[str, tuple[Version, bool]]:
    """package -> (version, whether every line of it has a hash), of one of locks/."""
    found = {}
    text = (ROOT / "locks" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line.split("--hash")[0].strip())
            (pin,) = requirement.specifier
            found[requirement.name] = Version(pin.version), "--hash=sha256:" in line
    return found


def unmet(lines: list[str], lock: dict[str, tuple[Version, bool]]) -> list[str]:
    """Requirements that a lock does not meet; torch is held by release elsewhere."""
    wanted = [Requirement(line) for line in lines]
    return [
        str(r)
        for r in wanted
        if r.name != "torch" and (r.name not in lock or lock[r.name][0] not in r.specifier)
    ]


def test_the_locks_hold_what_pyproject_asks_for_by_hash() -> None:
    extras = PROJECT["optional-dependencies"]
    run, dev = locked("run.txt"), locked("dev.txt")
    todo = "run make lock"
    assert unmet([*PROJECT["dependencies"], *extras["metrics"]], run) == [], todo
    assert unmet([*PROJECT["dependencies"], *extras["dev"]], dev) == [], todo
    assert unmet(["hatchling>=1.26"], locked("build.txt")) == []
    for lock in (run, dev, locked("build.txt")):
        assert lock and all(hashed for _, hashed in lock.values())
        assert not [name for name in lock if name.startswith(("torch", "nvidia", "triton"))]
    assert {name: run[name] for name in run if name in dev} == {n: dev[n] for n in run if n in dev}
    assert unmet(["no-such-package>=1"], run) and unmet(["numpy<1"], run)  # the twin


def test_torch_has_one_release_in_the_makefile_and_the_images() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    release = next(line for line in makefile.splitlines() if line.startswith("TORCH "))
    pinned = release.split(":=")[1].split("#")[0].strip()
    for role in ("server", "client"):
        text = (ROOT / role / "Dockerfile").read_text(encoding="utf-8")
        assert f"ARG TORCH_VERSION={pinned}\n" in text
