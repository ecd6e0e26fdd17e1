"""A file that a person named, read in one way: a regular file, up to a bound, and else a sentence.

| not there, a folder, a pipe, a device, links in a circle | refused: no waiting, nothing endless |
| larger than `most`                                       | refused before it is in memory       |
| not UTF-8, JSON or TOML; nested deeper than DEPTH;       | refused                              |
| a lone surrogate, which no file could hold again         | refused                              |

Errors: `kind`, an InputError unless the caller has a closer one; it names the file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError, InputError

SMALL = 16 * 2**20  # bytes: of plans, keys, reports
LARGE = 2**28  # of a model's JSON files: a tokenizer's has tens of megabytes
DEPTH = 100  # no file of ours nests deeper than ten
NAME, PATH = 255, 4095  # bytes that a name and a path may have
Kind = type[FedtuneError]
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_DOTTED = re.compile(rf"{_PART}(?:[ \t]*\.[ \t]*{_PART}){{{DEPTH}}}")  # a key of very many parts


def unusable(path: str | Path) -> str:
    """Why no file can have this path, or ""."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return "not valid text"
    if b"\0" in name:
        return "holds a NUL"
    if len(name) > PATH or any(len(part) > NAME for part in name.split(b"/")):
        return "longer than a path can be"
    return ""


def regular(path: Path, expected: str, todo: str = "", kind: Kind = InputError) -> Path:
    """`path`, which is a file that can be read. Errors: as above."""
    os.close(_opened(path, expected, todo, kind))
    return path


def content(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> bytes:
    """What is in the file. expected, todo: for the error. Errors: as above."""
    try:
        with open(_opened(path, expected, todo, kind), "rb") as file:
            body = file.read(most + 1)
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})", expected, todo) from None
    except MemoryError:
        raise kind(f"{path}: too large for this machine's memory", expected, todo) from None
    if len(body) > most:
        raise kind(f"{path}: larger than {most // 2**20} MiB", expected, todo)
    return body


def text(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> str:
    """The file's text, from UTF-8. Errors: as above."""
    try:
        return content(path, expected, todo, kind, most).decode("utf-8")
    except UnicodeDecodeError:
        raise kind(f"{path}: is not UTF-8", expected, todo or "save it as UTF-8") from None


def json_in(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> dict[str, Any]:
    """The JSON object in the file. Errors: as above."""
    return _table(path, json.loads, "JSON", expected, todo, kind, most)


def json_lines_in(path: Path, expected: str, todo: str = "") -> list[dict[str, Any]]:
    """The JSON objects in the file, one a line. Errors: as above."""

    def parse(said: str) -> dict[str, Any]:
        rows = [json.loads(line) for line in said.splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError
        return {"rows": rows}

    body = _table(path, parse, "JSON lines", expected, todo, InputError, LARGE)
    rows: list[dict[str, Any]] = body["rows"]
    return rows


def toml_in(path: Path, expected: str, todo: str = "", kind: Kind = InputError) -> dict[str, Any]:
    """The tables in the file. Errors: as above."""
    return _table(path, _toml, "TOML", expected, todo, kind, SMALL)


def sound(body: Any) -> bool:
    """Whether a parsed value is nested no deeper than DEPTH and holds text that UTF-8 can."""
    level = [body]
    for _ in range(DEPTH):
        if not level:
            return True
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not _encodes(value):
                return False
        level = below
    return not level


def _encodes(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _toml(said: str) -> Any:
    if _DOTTED.search(said):  # tomllib takes a time that is quadratic in a key's parts
        raise RecursionError
    return tomllib.loads(said)


def _table(
    path: Path, parse: Any, form: str, expected: str, todo: str, kind: Kind, most: int
) -> dict[str, Any]:
    said = text(path, expected, todo, kind, most)
    try:
        body = parse(said)
    except RecursionError:
        raise kind(f"{path}: nested too deep", expected, todo) from None
    except tomllib.TOMLDecodeError as error:  # says where; of a plan, which holds no record
        raise kind(f"{path}: not valid TOML: {error}", expected, todo) from None
    except (ValueError, MemoryError):  # also a number of thousands of digits
        raise kind(f"{path}: not valid {form}", expected, todo) from None
    if not isinstance(body, dict):
        raise kind(f"{path}: not a JSON object", expected, todo)
    if not sound(body):
        raise kind(f"{path}: nested too deep, or not valid text", expected, todo)
    return body


def _opened(path: Path, expected: str, todo: str, kind: Kind) -> int:
    """A descriptor of a regular file. O_NONBLOCK: a pipe without a writer is opened at once."""
    if why := unusable(path):
        raise kind(f"{str(path)[:80]}: {why}", expected, todo)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise kind(f"{path}: no such file", expected, todo) from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})", expected, todo) from None
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return file
    os.close(file)
    what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise kind(f"{path}: is {what}", expected, todo)


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of the files in a folder by name; "" where nothing is there."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for each in found:
        if each.is_file():
            content = hashlib.sha256(each.read_bytes()).hexdigest()
            total.update(f"{each.name} {content}\n".encode())
    return total.hexdigest() if any(each.is_file() for each in found) else ""
