"""Files of records that are not what their names say, for every command that reads a site's."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.bad_sources import COLUMNS, FHIR, OLD, SQLITE
from tests.fuzz.case import ANY_CODE, DEEP, PLAN, PRIVATE, SITE, Case, Damage

READERS = (
    ("doctor", SITE),
    ("data", "report", SITE),
    ("data", "report", SITE, "--study", PLAN),
    ("data", "describe", SITE),
    ("withdraw", SITE, "--file", "keys.txt"),
    ("withdraw", SITE, "--file", "keys.txt", "--check"),
    ("simulate", PLAN, SITE, "--out", "new"),
    ("label", SITE, "--generator", "./base", "--new-tokens", "1", "--out", "new.jsonl"),
)
SECRET = PRIVATE.encode()
ROW = b'{"who": "p1", "q": "%s", "a": "y"}\n' % SECRET
LINES: dict[str, bytes] = {
    "only a mark": b"\xef\xbb\xbf",
    "utf-16": (ROW * 9).decode().encode("utf-16"),
    "utf-32": (ROW * 9).decode().encode("utf-32"),
    "an array": b"[" + ROW.strip() + b"," + ROW.strip() + b"]",
    "one line": (ROW * 9).replace(b"\n", b""),
    "CRs": (ROW * 9).replace(b"\n", b"\r"),
    "halved": (ROW * 9)[:-20],
    "deep": b'{"q": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
    "digits": b'{"who": 1%s, "q": "x", "a": "y"}\n' % (b"0" * 5000),
    "infinite": b'{"who": Infinity, "q": NaN, "a": -Infinity}\n' * 9,
    "surrogates": b'{"who": "\\ud800", "q": "\\udfff", "a": "y"}\n' * 9,
    "numbers": b'{"who": 1, "q": 2, "a": 3}\n' * 9,
    "nested": b'{"who": {"a": [1]}, "q": ["%s"], "a": {}}\n' % SECRET * 9,
    "keys": b"".join(b'{"%s %d": 1, "q": 1}\n' % (SECRET, n) for n in range(9)),
    "twice": b'{"who": "p", "who": "q", "q": "x", "a": "y", "q": "z"}\n' * 9,
    "empty": b'{"who": "", "q": "", "a": ""}\n' * 9,
    "blank": b'{"who": " ", "q": "\\t", "a": "\\u00a0"}\n' * 9,
    "long": b'{"who": "p", "q": "%s", "a": "y"}\n' % (b"x" * 3_000_000),
    "terminal": b'{"who": "\\u001b[31m", "q": "\\u001b[31m", "a": "\\u0007"}\n' * 9,
    "one patient": ROW * 500,
}
CELLS: dict[str, bytes] = {
    "no header": b"p1,%s,y\np2,%s,n\n" % (SECRET, SECRET),
    "header alone": b"who,q,a\n",
    "twice in the header": b"who,q,q,a\np1,x,y,z\n",
    "an open quote": b'who,q,a\np1,"%s,y\np2,x,n\n' % SECRET,
    "a quote inside": b'who,q,a\np1,a"b"c,y\n',
    "semicolons": b"who;q;a\np1;%s;y\n" % SECRET,
    "tabs": b"who\tq\ta\np1\t%s\ty\n" % SECRET,
    "ragged": b"who,q,a\np1\np2,%s,y,z,w\n" % SECRET,
    "NUL": b"who,q,a\np1,\0%s,y\n" % SECRET,
    "latin": b"who,q,a\np1,\xe9\xff%s,y\n" % SECRET,
    "utf-16": b"who,q,a\np1,x,y\n".decode().encode("utf-16"),
    "a wide row": b"who,q,a\n" + b"x," * 50_000 + b"\n",
    "a wide header": b",".join(b"c%d" % n for n in range(20_000)) + b"\n",
    "a huge cell": b"who,q,a\np1," + b"x" * 3_000_000 + b",y\n",
    "terminal": b"who,q,a\n\x1b[31m,\x1b[31m,\x07\n",
    "CRs": b"who,q,a\rp1,x,y\r",
    "nothing": b"",
}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _arrow(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.ipc

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


GOOD = [{"who": f"p{n}", "q": f"{PRIVATE} {n}", "a": "yn"[n % 2]} for n in range(20)]
TABLES: dict[str, list[dict[str, Any]]] = {
    "whole": GOOD,
    "no rows": [],
    "other columns": [{"y": PRIVATE, "x": 2}],
    "numbers": [{"who": 1, "q": 2.5, "a": True}] * 9,
    "nested": [{"who": ["a"], "q": {"b": 1}, "a": [[1]]}] * 9,
    "empty": [{"who": None, "q": None, "a": None}] * 9,
    "bytes": [{"who": b"\xff", "q": SECRET, "a": b"\0"}] * 9,
}
RESOURCES: dict[str, bytes] = {
    "another": b'{"resourceType": "Patient", "id": "%s"}\n' % SECRET * 9,
    "no type": b'{"id": "%s"}\n' % SECRET * 9,
    "a type of numbers": b'{"resourceType": 5, "subject": []}\n' * 9,
    "a url": json.dumps({"resourceType": "DocumentReference", "subject": {"reference": "Patient/1"},
                         "content": [{"attachment": {"url": "http://127.0.0.1:9/x"}}]}).encode(),
    "no base64": json.dumps({"resourceType": "DocumentReference",
                             "subject": {"reference": "Patient/1"},
                             "content": [{"attachment": {"contentType": "text/plain",
                                                         "data": "%%%"}}]}).encode(),
    "strange lists": b'{"resourceType": "DocumentReference", "content": {"a": 1}, "subject": 7}\n',
    "an array": b"[{}]",
}  # fmt: skip


def _file(name: str, body: bytes, data: str = "") -> Damage:
    """The site's records are this file."""

    def damage(world: Path) -> None:
        place = world / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(body)
        path = world / SITE
        text = path.read_text(encoding="utf-8")
        assert OLD in text
        path.write_text(text.replace(OLD, data or f'path = "{name}"\n{COLUMNS}'), encoding="utf-8")

    return damage


def damages() -> Iterator[tuple[str, Damage]]:
    for name, body in LINES.items():
        yield f"jsonl: {name}", _file("x.jsonl", body)
    for name, body in CELLS.items():
        yield f"csv: {name}", _file("x.csv", body)
    for name, rows in TABLES.items():
        for suffix, write in (("parquet", _parquet), ("arrow", _arrow)):
            body = write(rows)
            yield f"{suffix}: {name}", _file(f"x.{suffix}", body)
            if name == "whole":
                for share in (0.1, 0.5, 0.99):
                    cut = body[: int(len(body) * share)]
                    yield f"{suffix}: cut at {share}", _file(f"x.{suffix}", cut)
                for at in (3, len(body) // 3, len(body) // 2, len(body) - 9):
                    flipped = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
                    yield f"{suffix}: byte {at}", _file(f"x.{suffix}", flipped)
    for name, body in RESOURCES.items():
        place = "bulk/DocumentReference.ndjson"
        columns = 'columns = { text = "text", patient = "patient" }\n'
        yield f"fhir: {name}", _file(place, body, FHIR + columns)
    for number, body in enumerate((b"", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 8192)):
        yield f"sqlite: {number}", _file("clinic.db", body, SQLITE + COLUMNS)


def records() -> Iterator[Case]:
    """Every bad file of records, for four of the commands that read one, in turn."""
    for number, (name, damage) in enumerate(damages()):
        for more in range(0, len(READERS), 2):
            command = READERS[(number + more) % len(READERS)]
            yield Case(f"records {name}: {' '.join(command[:4])}", damage, command, ANY_CODE)
