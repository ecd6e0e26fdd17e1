"""What lies in the current folder is never run by a child, whatever its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.core import boot

ROOT = Path(__file__).parents[2]
# What a person runs in a folder of files from elsewhere: the parent finds its own modules there
# neither, the child is what is looked at.
PARENT = """
import os, subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from fedtune.core.processes import Child, begin_log
begin_log(Path({home!r}, "log"))
with Child("rank", ["x"], home=Path({home!r}), log=Path({home!r}, "log")) as child:
    child._process.wait(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with files from elsewhere: each tells where it ran, if it did."""
    place = tmp_path / "study"
    for name in (
        "secrets.py",
        "queue.py",
        "fedtune/__init__.py",
        "fedtune/core/vault/rank_process.py",
    ):
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return place


def python(folder: Path, code: list[str], path: str | None) -> subprocess.CompletedProcess[str]:
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        given["PYTHONPATH"] = path
    return subprocess.run(code, cwd=folder, env=given, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("path", [None, "", os.pathsep, ".", "HERE"])
def test_a_child_runs_nothing_of_the_current_folder(
    folder: Path, tmp_path: Path, path: str | None
) -> None:
    path = str(folder) if path == "HERE" else path
    code = (
        f"import sys; sys.path = [p for p in sys.path if p not in ('', {str(folder)!r})];"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import json, subprocess\nfrom fedtune.core import boot\n"
        "done = subprocess.run(boot.command('tests.flower.says'), env=boot.environment(),"
        " capture_output=True, text=True)\n"
        "print(done.stdout or done.stderr)"
    )
    done = python(folder, [sys.executable, "-P", "-c", code], path)
    found, own, order = done.stdout.split("\n")[:3]
    assert found == os.path.join(os.path.dirname(os.__file__), "secrets.py"), done
    assert own == str(ROOT / "fedtune" / "__init__.py")
    assert order == "standard library first"
    assert not (tmp_path / "ran").exists()


def test_every_child_is_started_that_way(folder: Path, tmp_path: Path) -> None:
    """A program of the kind that the server starts: of this copy, and not of the folder."""
    home = tmp_path / "home"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PARENT.format(
        root=str(ROOT), home=str(home)
    )
    python(folder, [sys.executable, "-P", "-c", code], None)
    log = (home / "log").read_text()
    assert (
        "fedtune/core/vault/rank_process.py" in log and str(ROOT) in log
    )  # ours ran, and did not like its options
    assert not (tmp_path / "ran").exists()


def test_the_twin_an_empty_entry_is_the_current_folder(folder: Path, tmp_path: Path) -> None:
    """What an empty entry of PYTHONPATH means to Python, with -P too."""
    done = python(folder, [sys.executable, "-P", "-c", "import secrets"], f"{ROOT}{os.pathsep}")
    assert done.returncode == 0, done
    assert (tmp_path / "ran").read_text().startswith("secrets.py")


def test_what_the_user_put_on_the_path_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/opt/a", "", "b", str(tmp_path), "/opt/c"]))
    assert boot.environment()["PYTHONPATH"] == "/opt/a:/opt/c"


def test_no_child_is_started_in_another_way() -> None:
    """pip is another project's program; it gets the same environment, and -P."""
    starts = {
        str(file.relative_to(ROOT))
        for package in ("fedtune", "client", "server")
        for file in (ROOT / package).rglob("*.py")
        if "sys.executable" in file.read_text(encoding="utf-8")
    }
    assert starts == {"fedtune/core/boot.py", "fedtune/core/bases/wheel.py"}
