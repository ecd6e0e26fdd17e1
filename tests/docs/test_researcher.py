"""The researcher's door, from its first command in the clone to a model in use, line by line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read
from tests.network.kit import FEDTUNE, environment

DOOR = ROOT / "docs" / "researcher.md"


def shell(folder: Path, lines: str) -> str:
    """Run a block's lines in one shell, which stops at the first that fails; what they print."""
    command = folder / "bin" / "fedtune"
    if not command.exists():
        command.parent.mkdir()
        words = f"exec {FEDTUNE[0]} -c '{FEDTUNE[2]}' \"$@\""
        command.write_text(f"#!/bin/sh\n{words}\n")
        command.chmod(0o755)
    own = environment()
    path = f"{command.parent}:{Path(sys.executable).parent}:{own['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", lines], cwd=folder, text=True, capture_output=True, check=False,
        env=own | {"PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"{lines}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def typed(lines: str, shown: str) -> str:
    """The lines as a reader types them, with the fingerprint that the reader's own run showed."""
    own = re.findall(r"verify runs/desks --trust (\"[0-9a-f ]+\")", shown)
    return re.sub(r"--trust \"[0-9a-f ]+\"", f"--trust {own[-1]}", lines) if own else lines


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.real
def test_every_line_of_the_researchers_door_works(tmp_path: Path) -> None:
    blocks = [b for b in read(DOOR.read_text(encoding="utf-8")).blocks if not b.why]
    shown = list[str]()
    for block in blocks:
        if block.language == "sh":
            shown.append(shell(tmp_path, typed(block.text, "".join(shown))))
    report = json.loads((tmp_path / "runs" / "desks" / "report.json").read_text())
    quality = report["quality"]
    assert quality["after"]["accuracy"] > quality["before"]["accuracy"]
    assert report["privacy"]["epsilon"] <= 4.9
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
    assert (tmp_path / "runs" / "desks" / "answers.json").is_file()
    assert re.search(r"'label': '[A-R]'", "".join(shown))


def test_twin_a_line_that_fails_stops_the_researcher(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="No such option"):
        shell(tmp_path, "fedtune plan study.toml --sizes 80\ntrue")


def test_what_is_not_run_is_what_needs_another_machine_or_a_person() -> None:
    blocks = read(DOOR.read_text(encoding="utf-8")).blocks
    unrun = [block.text for block in blocks if block.why and block.language == "sh"]
    assert len(unrun) == 2 and "make install" in unrun[0] and "fedtune dashboard" in unrun[1]
