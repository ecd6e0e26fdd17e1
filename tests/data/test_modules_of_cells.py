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
    _arrow._import_what_cells_need = lambda: None
list(Parquet().rows(Path(sys.argv[2]), Names()))
before = set(sys.modules)
for path in sys.argv[3:]:
    list(Parquet().rows(Path(path), Names()))
try:
    jinja2.Environment().from_string("{{ 1 / 0 }}").render()
except ZeroDivisionError:
    pass
print(json.dumps(sorted(set(sys.modules) - before)))
"""


@pytest.mark.parametrize("twin", ["as it is", "twin"])
def test_no_cell_has_a_module_imported(tmp_path: Path, twin: str) -> None:
    """A file in which one cell has a value, of each kind, after one in which none has. A template's
    error too. Twin: without what is imported before the first row."""
    paths = []
    for number, (kind, value) in enumerate([(pa.string(), None), *KINDS.values()]):
        cells = pa.array([None, value], kind)
        table = pa.table({"text": ["aa", "bb"], "other": cells})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        paths.append(str(tmp_path / f"{number}.parquet"))
    done = subprocess.run(
        [sys.executable, "-c", READS, twin, *paths], capture_output=True, text=True, check=True
    )
    new = json.loads(done.stdout)
    assert bool(new) is (twin == "twin"), new
