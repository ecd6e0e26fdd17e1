"""Who agreed, by a column or a list of opt-outs: decided before anything is computed."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedtune.core.config import Columns, ConsentTable, SiteData
from fedtune.core.data.records import Read, read_file
from fedtune.core.errors import DataError

COLUMNS = Columns(text="note", patient="who")
COLUMN = {"column": "agreed"}


def row(who: Any, note: Any = "cough", agreed: Any = "yes", **more: Any) -> dict[str, Any]:
    return {"who": who, "note": note, "agreed": agreed} | more


def sha256(key: str, salt: str = "") -> str:
    return hashlib.sha256((salt + key).encode()).hexdigest()


def read(folder: Path, rows: list[Any], unit: Any = "patient", **changes: Any) -> Read:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    consent = changes.pop("consent", COLUMN)
    fields = {"path": path, "columns": COLUMNS, "consent": consent} | changes
    return read_file(SiteData.model_validate(fields), unit=unit, strict=False)


def left(read: Read) -> list[str]:
    return [record.completion for record in read.records]


def listed(folder: Path, *lines: str, name: str = "opt-outs.txt") -> Path:
    path = folder / name
    path.touch(mode=0o600)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_one_row_that_does_not_say_yes_leaves_its_patient_out(tmp_path: Path) -> None:
    rows = [row("a", "a1"), row("b", "b1"), row("a", "a2", "no"), row(" a ", "a3"), row("c", "c1")]
    found = read(tmp_path, rows)
    assert left(found) == ["b1", "c1"]
    assert found.withheld == 3 and not found.failed


@pytest.mark.parametrize(
    "agreed", [None, "", "  ", "Yes", "no", True, 1, ["yes"], {"a": 1}, "yes\0"]
)
def test_what_is_not_the_word_is_no_yes(tmp_path: Path, agreed: Any) -> None:
    found = read(tmp_path, [row("a", "a1", agreed), row("b", "b1", " yes ")])
    assert left(found) == ["b1"] and found.withheld == 1
    absent = {"who": "a", "note": "a1"}
    assert left(read(tmp_path, [absent, row("b", "b1")])) == ["b1"]


def test_words_and_numbers_that_mean_yes_are_declared(tmp_path: Path) -> None:
    rows = [row("a", "a1", 1), row("b", "b1", "1"), row("c", "c1", "granted"), row("d", "d1", "0")]
    consent = COLUMN | {"values": (1, "granted")}
    assert left(read(tmp_path, rows, consent=consent)) == ["a1", "b1", "c1"]


def test_a_row_that_the_filter_leaves_out_still_speaks_for_its_patient(tmp_path: Path) -> None:
    """A no is a no, wherever it was said: also in a row that another study would read."""
    rows = [row("a", "a1", ward="3"), row("a", "a2", "no", ward="4"), row("b", "b1", ward="3")]
    assert left(read(tmp_path, rows, filter={"ward": "3"})) == ["b1"]
    rows[1]["note"] = None
    assert left(read(tmp_path, rows, filter={"ward": "3"})) == ["b1"], "a row that cannot be used"


def test_where_records_are_protected_a_patients_no_still_counts_for_all(tmp_path: Path) -> None:
    rows = [row("a", "a1"), row("a", "a2", "no"), row("b", "b1")]
    assert left(read(tmp_path, rows, unit="record")) == ["b1"]
    columns = Columns(text="note")
    assert left(read(tmp_path, rows, unit="record", columns=columns)) == ["a1", "b1"]


@pytest.mark.parametrize("hashing", ["sha256", "salted-sha256", "hmac-sha256"])
def test_who_is_on_a_list_of_hashed_keys_is_left_out(tmp_path: Path, hashing: str) -> None:
    digest = {
        "sha256": sha256("7"),
        "salted-sha256": sha256("7", "of 2026"),
        "hmac-sha256": hmac.new(b"of 2026", b"7", "sha256").hexdigest(),
    }[hashing]
    path = listed(tmp_path, "# as the register sends it", "", digest.upper(), sha256("somebody"))
    consent: dict[str, Any] = {"opt_outs": path, "hashing": hashing}
    if hashing != "sha256":
        consent["salt_file"] = listed(tmp_path, "of 2026", name="salt")
    rows = [row(7, "a1"), row(" 7 ", "a2"), row("8", "b1"), row(None, "of nobody")]
    found = read(tmp_path, rows, consent=consent)
    assert left(found) == ["b1"] and found.withheld == 3
    assert left(read(tmp_path, rows, consent=consent | COLUMN)) == ["b1"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_list_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = listed(tmp_path, sha256("a"))
    path.chmod(mode)
    with pytest.raises(DataError, match=r"other users can read it.*chmod 600"):
        read(tmp_path, [row("a")], consent={"opt_outs": path})
    path.chmod(0o600)
    salt = listed(tmp_path, "salt", name="salt")
    salt.chmod(mode)
    consent = {"opt_outs": path, "hashing": "hmac-sha256", "salt_file": salt}
    with pytest.raises(DataError, match="other users can read it"):
        read(tmp_path, [row("a")], consent=consent)


def test_a_list_that_cannot_be_read_trains_nobody_and_quotes_no_line(tmp_path: Path) -> None:
    path = listed(tmp_path, sha256("a"), "4321 Zaphod")
    with pytest.raises(DataError, match="line 2: not a sha256 of a key") as caught:
        read(tmp_path, [row("a")], consent={"opt_outs": path})
    assert "Zaphod" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path, [row("a")], consent={"opt_outs": tmp_path / "none"})


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + sha256("a").encode(),  # as an editor on Windows saves it
        sha256("a").encode("utf-16"),
        sha256("a").encode() + b"," + sha256("b").encode(),
        sha256("a").encode()[:-1],  # cut off, as by a full disk
        sha256("a").encode() + b"\0",
        b'"' + sha256("a").encode() + b'"',
        b"sha256:" + sha256("a").encode(),
        sha256("a").encode() + b"\r" + b"Zaphod",
        b"\xff\xfe",
    ],
)
def test_of_a_damaged_list_no_line_is_left_out(tmp_path: Path, content: bytes) -> None:
    """Who is on a line that cannot be read would else be trained on."""
    path = listed(tmp_path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"line \d: not a sha256 of a key"):
        read(tmp_path, [row("a")], consent={"opt_outs": path})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"consent": {}}, "name a column"),
        ({"consent": COLUMN | {"values": ()}}, "no patient would consent"),
        ({"consent": {"opt_outs": "x", "salt_file": "y"}}, "salt_file"),
        ({"consent": {"opt_outs": "x", "hashing": "hmac-sha256"}}, "salt_file"),
        ({"consent": {"opt_outs": "x"}, "columns": Columns(text="note")}, "columns.patient"),
    ],
)
def test_what_could_leave_nobody_out_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SiteData.model_validate({"path": "x", "columns": COLUMNS} | changes)


def test_nobody_else_changes(tmp_path: Path) -> None:
    """Of those who stay, every record is the same whoever opted out, who never was there, or who
    agreed."""
    others = [row("b", "b1"), row("c", "b1"), row("c", "c2")]
    opted = read(tmp_path, [row("a", "b1", "no"), *others])
    agreed = read(tmp_path, [row("a", "b1"), *others])
    absent = read(tmp_path, others)

    def of_others(found: Read) -> list[Any]:
        return [(r.unit, r.completion) for r in found.records if r.unit != "a"]

    assert of_others(opted) == of_others(agreed) == of_others(absent)
    assert ConsentTable(column="x").yes == {"yes"}


def test_a_salt_is_its_bytes_but_for_a_final_newline(tmp_path: Path) -> None:
    salt = bytes(range(100, 131)) + b" "
    path = listed(tmp_path, hmac.new(salt, b"7", "sha256").hexdigest())
    for end in (b"", b"\n", b"\r\n"):
        file = listed(tmp_path, name="salt")
        file.write_bytes(salt + end)
        consent = {"opt_outs": path, "hashing": "hmac-sha256", "salt_file": file}
        assert left(read(tmp_path, [row(7, "a1"), row(8, "b1")], consent=consent)) == ["b1"]
