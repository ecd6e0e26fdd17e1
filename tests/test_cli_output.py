"""What the command leaves where nobody reads it any more, and how its libraries' warnings look."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.cli.exit_codes import NOT_READ
from tests.cli_kit import STUDY

WARNS = """
import logging
from fedtune.cli import log_lines
log_lines.use_one_style()
logging.basicConfig(format="%(asctime)s:%(levelname)s:%(message)s")  # as opacus does
logging.getLogger("fedtune.data").warning("a record cannot be read (%s)", "a\\x1bb")
logging.getLogger("peft.tuners").warning("of another")
"""


def unread(*words: object) -> tuple[int, str]:
    """Run the command with a pipe that nobody reads; its exit code and what it said on stderr."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "fedtune", *map(str, words)]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writes)
    return done.returncode, done.stderr


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_pipe_that_nobody_reads_ends_the_command_without_a_word(
    tmp_path: Path, how: tuple[str, ...]
) -> None:
    privacy = "[privacy]\nepsilon = 8\ndelta = 1e-4\n"
    study = tmp_path / "study.toml"
    study.write_text(STUDY.format(base="none", privacy=privacy, privacy_off=""))
    code, said = unread("plan", study, "--size", 200, *how)
    assert code == NOT_READ and "roken" not in said and "fedtune:" not in said, said


def test_so_does_help() -> None:
    assert unread("--help") == (NOT_READ, "")


def test_a_disk_that_is_full_is_still_an_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip(f"{sys.platform} has no /dev/full")
    command = [sys.executable, "-m", "fedtune", "--version"]
    with full.open("w") as nowhere:
        done = subprocess.run(command, stdout=nowhere, stderr=subprocess.PIPE, timeout=300)
    assert done.returncode not in (0, NOT_READ)


def test_warnings_begin_with_whose_they_are() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WARNS], capture_output=True, text=True, timeout=300
    )
    assert done.stderr.splitlines() == [
        "fedtune: a record cannot be read (a?b)", "peft: of another",
    ]  # fmt: skip
