"""How many numbers of processes and threads an order uses up is the same with and without a unit:
every account of a machine reads its one counter, by starting a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.core.processes import AT_A_SITE
from tests.conftest import tiny_llama

ALONE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
THREADS = 4
Used = list[tuple[str, int]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose products are large enough for several threads."""
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this Linux gives no namespace of process numbers")
    return tiny_llama(tmp_path_factory.mktemp("base") / "wider", hidden=256)


def used_up(base: Path, folder: Path) -> list[Used]:
    """How many numbers each order of a study used up, by tests/guarantee/process_numbers.py."""
    command = [sys.executable, "-m", "tests.guarantee.process_numbers", str(base), str(folder)]
    # Threads that wait sleep at once: there may be fewer cores than threads.
    waiting = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(THREADS)}
    run = subprocess.run(
        [*ALONE, *command, str(THREADS)],
        env=os.environ | waiting | {"FEDTUNE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return [[(name, count) for name, count in json.loads(line)] for line in run.stdout.splitlines()]


@pytest.mark.long
def test_a_short_note_uses_up_no_number_of_a_process(base: Path, tmp_path: Path) -> None:
    """The twin: a thread starts with each block."""
    shipped, twin, shipped_with, twin_with = used_up(base, tmp_path)
    assert shipped_with == shipped
    assert twin_with != twin


TOKENISES = """
import json, os, sys, types
from fedtune.core import processes
from transformers import AutoTokenizer
base, *programs = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
def main(_):
    before = len(os.listdir("/proc/self/task"))
    tokenizer("of one record")
    print(json.dumps([program, before, len(os.listdir("/proc/self/task"))]), flush=True)
    os._exit(0)
sys.modules["tokenises"] = types.SimpleNamespace(main=main)
processes.PROGRAMS = dict.fromkeys(processes.PROGRAMS, ("tokenises", "a program"))
for program in programs:  # each begins in a process of its own
    if os.fork() == 0:
        processes._main(program)
    os.wait()
"""
STARTED = (*AT_A_SITE, "superlink")


@pytest.fixture(scope="module", params=[pytest.param("", marks=pytest.mark.long), "true"])
def threads(request: pytest.FixtureRequest, tiny_base: Path) -> dict[str, tuple[int, int]]:
    """How many threads each program has before and after its first text, whatever a person's
    environment asks for."""
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment |= {"TOKENIZERS_PARALLELISM": request.param} if request.param else {}
    with subprocess.Popen(
        [sys.executable, "-c", TOKENISES, str(tiny_base), *STARTED],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        told = [json.loads(line) for line in run.stdout]
    return {program: (before, after) for program, before, after in told}


@pytest.mark.parametrize("program", STARTED)
def test_no_first_text_starts_threads(threads: dict[str, tuple[int, int]], program: str) -> None:
    """Twin: a program that reads no records."""
    before, after = threads[program]
    assert (after == before) is (program in AT_A_SITE or os.cpu_count() == 1)
