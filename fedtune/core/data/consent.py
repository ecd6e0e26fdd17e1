"""Leave out the rows of patients who did not consent to the use of their records, before anything
is computed.

Guarantee: whether a patient is left out depends on that patient's own rows and the list of opt-outs
alone. Leaving one patient out changes nothing in another patient's records."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fedtune.core.config import ConsentTable, SiteData
from fedtune.core.data.cells import key_of
from fedtune.core.data.files import Place, Rejected
from fedtune.core.data.sources._interface import BadCell, Row
from fedtune.core.errors import DataError
from fedtune.core.files import reading

NO_CONSENT = "no consent"  # stands in place of a row; no source gives this reason
DIGEST = re.compile(r"[0-9a-fA-F]{64}")
LARGEST = 2**30  # bytes of a list: 16 million opt-outs


def with_consent(
    rows: Iterable[tuple[Place, Row | str]], data: SiteData
) -> Iterator[tuple[Place, Row | str]]:
    """Yield the (place, row) pairs in order, but with NO_CONSENT instead of each row whose patient
    did not consent. data: the site's [data] table, with the consent column and the list of
    opt-outs; if it names neither, the pairs are yielded unchanged.

    | case                                         | what is done                              |
    |----------------------------------------------|-------------------------------------------|
    | one row of a patient does not say yes        | all of that patient's rows are left out   |
    | the consent cell is missing or has no value  | the row does not say yes                  |
    | a row is unusable because of another cell    | its consent cell counts                   |
    | there is no patient column                   | each row counts for itself alone          |
    | a row has no key, and there are opt-outs     | left out, as its patient may be on that list |
    Errors: DataError if the list or its salt cannot be read, or may be read by other users."""
    table = data.consent
    if table is None:
        yield from rows
        return
    has_opted_out = opted_out(table)
    placed = list(rows)  # a later row may take back what an earlier one gave
    cells = [_cells_of(row) for _, row in placed]
    said = [row is None or _agrees(row, table) for row in cells]
    keys = [_key_in(row, data.columns.patient) for row in cells]
    refused = {key for key, yes in zip(keys, said, strict=True) if key and not yes}
    for (place, row), key, yes in zip(placed, keys, said, strict=True):
        withheld = not yes or key in refused
        if isinstance(row, dict) and has_opted_out is not None:
            withheld = withheld or not key or has_opted_out(key)
        yield place, NO_CONSENT if withheld else row


def opted_out(table: ConsentTable) -> Callable[[str], bool] | None:
    """Read the list of opt-outs that site.toml names, and return a function that takes a patient's
    key and returns whether it is on the list. Return None if site.toml names no list.

    Errors: DataError, if the list or its salt cannot be used; it quotes no line of the list."""
    if table.opt_outs is None:
        return None
    listed = frozenset(_digests(table.opt_outs))
    salt = reading.secret(table.salt_file, "a salt", DataError) if table.salt_file else b""
    salt = salt.removesuffix(b"\n").removesuffix(b"\r")  # an editor's line end; all else is salt

    def digest(key: str) -> bytes:
        if table.hashing == "hmac-sha256":
            return hmac.digest(salt, key.encode(), "sha256")
        return hashlib.sha256(salt + key.encode()).digest()

    return lambda key: digest(key) in listed


def _digests(path: Path) -> Iterator[bytes]:
    lines = reading.secret(path, "a list of opt-outs", DataError, LARGEST).splitlines()
    for number, line in enumerate(lines, 1):
        text = line.decode("ascii", "replace").strip()
        if not text or text.startswith("#"):
            continue
        if not DIGEST.fullmatch(text):
            raise DataError(
                f"{path} line {number}: not a sha256 of a key",
                "64 hexadecimal digits on each line",
                "hash the keys as data.consent.hashing says; until then this site does not train",
            )
        yield bytes.fromhex(text)


def _agrees(row: Row, table: ConsentTable) -> bool:
    if table.column is None:
        return True
    try:
        return key_of(row.get(table.column)) in table.yes
    except Rejected:
        return False


def _cells_of(row: Row | str) -> Row | None:
    """Return the cells of a row, by column; of a row that is unusable because of some cells, return
    the other cells. Return None if no cell can be read. row: the row, or the reason why it is
    unusable."""
    return row.cells if isinstance(row, BadCell) else row if isinstance(row, dict) else None


def _key_in(row: Row | None, column: str | None) -> str:
    """Return the key of the row's patient; "" if the row has none that can be read. row: the cells
    that can be read, None if there are none; column: the patient column, None if the file has none.
    """
    try:
        return key_of(row.get(column)) if row and column else ""
    except Rejected:
        return ""
