"""How many threads Arrow starts follows from no column of a Parquet file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

READ = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import pyarrow
from fedtune.core.data.sources.parquet import Parquet

pyarrow.set_cpu_count(8)
for path in map(Path, sys.argv[1:]):
    keys = {column: column for column in path.stem}
    names = SimpleNamespace(keys=keys, where="", header=lambda columns: None)
    rows = sum(1 for _ in Parquet().rows(path, names))
    print(rows, len(os.listdir("/proc/self/task")))
"""


def test_no_thread_starts_for_the_columns_of_a_file(tmp_path: Path) -> None:
    """A file of eight columns is read with the threads that one of a single column was read with.
    Where Arrow starts threads, the number follows from how many columns wait at once."""
    files = [tmp_path / f"{columns}.parquet" for columns in ("a", "abcdefgh")]
    for file in files:
        pq.write_table(
            pa.table({name: ["fever, no cough" * 99] * 3000 for name in file.stem}), file
        )
    command = [sys.executable, "-c", READ, *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    (rows, one), (others, eight) = (line.split() for line in run.stdout.splitlines())
    assert rows == others == "3000"
    assert eight == one
