"""What reading an Arrow file does to the process that reads it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from fedtune.core import boot

READS = """
import os, sys
import pyarrow as pa
from pathlib import Path
from fedtune.core.data.sources._interface import Names
from fedtune.core.data.sources.arrow import Arrow

path, cut_to = Path(sys.argv[1]), int(sys.argv[2])
pa.set_cpu_count(4)
before = len(os.listdir("/proc/self/task"))
rows = Arrow().rows(path, Names(path, {"one": "a", "other": "b"}))
found = [next(rows)]
if cut_to:
    os.truncate(path, cut_to)
try:
    found += rows
except Exception as error:
    print(type(error).__name__)
print(len(found), len(os.listdir("/proc/self/task")) - before)
"""
FORMS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}


def written(path: Path, form: str, compression: str | None = None) -> Path:
    """Twenty batches of four rows, of two columns of long texts."""
    cells = [f"{number} " * 20_000 for number in range(4)]
    batch = pa.record_batch({"a": pa.array(cells), "b": pa.array(cells)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with FORMS[form](str(path), batch.schema, options=options) as writer:
        for _ in range(20):
            writer.write_batch(batch)
    return path


def told(path: Path, cut_to: int = 0) -> list[str]:
    """What a process of its own says that reads a file: how many rows, how many threads more."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", READS, str(path), str(cut_to)],
        env=boot.environment() | {"PYTHONPATH": boot.PACKAGES},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    return done.stdout.split()


@pytest.mark.parametrize("form", FORMS)
def test_no_thread_is_started_however_long_a_column_takes(tmp_path: Path, form: str) -> None:
    """Threads take numbers of the machine's one counter of processes, which every account reads."""
    assert told(written(tmp_path / "a.arrow", form, "zstd")) == ["80", "0"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_cut_off_while_it_is_read_is_its_own_matter(
    tmp_path: Path, form: str
) -> None:
    """Mapped into memory, it would end the process that holds everybody's records."""
    said = told(written(tmp_path / "a.arrow", form), cut_to=4096)
    assert said == (["DataError", "4", "0"] if form == "stream" else ["80", "0"])
