"""Which modules a process imports follows from no record: it is seen in the files it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

KINDS: dict[str, tuple[Any, Any]] = {
    "text": (pa.string(), "x"),
    "microseconds": (pa.timestamp("us"), 5),
    "nanoseconds": (pa.timestamp("ns"), 5001),
    "zone": (pa.timestamp("us", tz="Europe/Oslo"), 5),
    "unknown zone": (pa.timestamp("us", tz="Nowhere/None"), 5),
    "list of a zone": (pa.list_(pa.timestamp("us", tz="Europe/Vaduz")), [5]),
    "duration": (pa.duration("ns"), 5001),
    "decimal": (pa.decimal128(5, 2), 1),
    "date": (pa.date32(), 7),
    "time": (pa.time64("ns"), 7001),
    "list": (pa.list_(pa.string()), ["a"]),
    "map": (pa.map_(pa.string(), pa.int64()), [("a", 1)]),
}
READS = """
import json, sys
import jinja2
from pathlib import Path
import fedtune.core.data.chat
from fedtune.core.data.sources import _arrow
from fedtune.core.data.sources.parquet import Parquet
class Names:
    keys, where = {"text": "text", "other": "other"}, "x"
    def header(self, names): pass
if sys.argv[1] == "twin":
    _arrow._import_what_cells_need = lambda types: None
new = set()
for empty, full in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    list(Parquet().rows(Path(empty), Names()))
    before = set(sys.modules)
    list(Parquet().rows(Path(full), Names()))
    new |= set(sys.modules) - before
before = set(sys.modules)
try:
    jinja2.Environment().from_string("{{ 1 / 0 }}").render()
except ZeroDivisionError:
    pass
print(json.dumps(sorted(new | set(sys.modules) - before)))
"""


@pytest.mark.parametrize("twin", ["as it is", "twin"])
def test_no_cell_has_a_module_imported(tmp_path: Path, twin: str) -> None:
    """A file in which one cell has a value, of each kind, after one in which none has. A template's
    error too. Twin: without what is imported before the first row."""
    paths = []
    for number, (kind, value) in enumerate(KINDS.values()):
        for which in (None, value):
            cells = pa.array([None, which], kind)
            table = pa.table({"text": ["aa", "bb"], "other": cells})
            paths.append(str(tmp_path / f"{number}-{which is None}.parquet"))
            pq.write_table(table, paths[-1])
    done = subprocess.run(
        [sys.executable, "-c", READS, twin, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    new = json.loads(done.stdout)
    assert bool(new) is (twin == "twin"), new
