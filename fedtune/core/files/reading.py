"""Read a file that a person named: a regular file of bounded length.

| the file                                                 | what is done                         |
|----------------------------------------------------------|--------------------------------------|
| missing, a folder, a pipe, a device, a symlink loop      | refused without blocking             |
| larger than `most`                                       | refused before all is in memory      |
| not UTF-8, JSON or TOML; nested deeper than DEPTH        | refused                              |
| with a lone surrogate, which cannot be written as UTF-8  | refused                              |

Errors: of the class `kind`, by default InputError. The error's text is one line that names the
path. Of the file's content this line has at most a key or a character of a TOML file."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError, InputError

SMALL = 16 * 2**20  # bytes: of keys, reports
TABLES = 2**20  # largest TOML file: a person wrote it, and parsing takes a second per MiB
LARGE = 2**28  # largest JSON file of a model: a tokenizer's has tens of megabytes
DEPTH = 100  # fedtune's own files nest at most ten deep
NAME, PATH = 255, 4095  # bytes that a name and a path may have
Kind = type[FedtuneError]
# Matches a whole TOML key; its group matches only if the key has more than DEPTH parts. The
# quantifiers are possessive, so that each character is read once, however long a word or a key is.
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
_NEXT = rf"(?:[ \t]*+\.[ \t]*+{_PART})"
_KEY = re.compile(rf"{_PART}{_NEXT}{{0,{DEPTH - 1}}}+({_NEXT})?")


def refuse_path(path: str | Path) -> str:
    """Return the reason why no file can have this path; "" if one can."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return "not valid text"
    if b"\0" in name:
        return "holds a NUL"
    if len(name) > PATH or any(len(part) > NAME for part in name.split(b"/")):
        return "longer than a path can be"
    return ""


class NotRegular(OSError):
    """A path leads to a folder, a pipe, a device or a socket, and not to a regular file."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. The call never waits: a pipe without a writer is refused at
    once.
    Errors: OSError; NotRegular if it is no regular file."""
    return open(descriptor(path), "rb")


def descriptor(path: str | Path, flags: int = os.O_RDONLY, folder: int | None = None) -> int:
    """Open a regular file and return its descriptor. That it is regular is checked on the open
    file, since the name may refer to something else a moment later.

    - path: the file; relative to `folder`, if that is given
    - flags: os.O_… for opening
    - folder: the descriptor of a folder, which stays open

    The call never waits: a pipe without a writer is opened at once, and then refused. Errors:
    OSError; NotRegular if it is no regular file."""
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=folder)
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return number
    os.close(number)
    raise NotRegular(errno.EINVAL, "a folder" if stat.S_ISDIR(mode) else "not a regular file")


def regular(path: Path, expected: str, todo: str = "", kind: Kind = InputError) -> Path:
    """Check that `path` is a readable regular file, and return the path.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error

    Errors: an error of the class `kind` if it is no readable regular file."""
    os.close(_open_descriptor(path, expected, todo, kind))
    return path


def content(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> bytes:
    """Read a file and return its bytes.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error
    - most: how many bytes the file may have

    Errors: an error of the class `kind` if it is no readable regular file, or is larger than
    `most`."""
    try:
        with open(_open_descriptor(path, expected, todo, kind), "rb") as file:
            length = os.fstat(file.fileno()).st_size
            data = file.read(min(length, most) + 1)  # no more: Python allocates it first
            if len(data) > length:  # it has grown, or the system does not know its length
                data += file.read(most + 1 - len(data))
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})", expected, todo) from None
    except MemoryError:
        raise kind(f"{path}: too large for this machine's memory", expected, todo) from None
    if len(data) > most:
        raise kind(f"{path}: larger than {most // 2**20} MiB", expected, todo)
    return data


def secret(path: Path, expected: str, kind: Kind = InputError, most: int = SMALL) -> bytes:
    """Return the bytes of a file that only this user may read.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - kind: the class of the error
    - most: how many bytes the file may have

    Errors: an error of the class `kind` if it is no readable regular file, is larger than `most`,
    or if other users have any right to it."""
    data = content(path, expected, kind=kind, most=most)
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise kind(
            f"{path}: is a secret, and other users can read it", "mode 0600", f"chmod 600 {path}"
        )
    return data


def text(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> str:
    """Return the file's content as text in UTF-8.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said, or "save it as
      UTF-8" if the file is not UTF-8
    - kind: the class of the error
    - most: how many bytes the file may have

    Errors: an error of the class `kind` if it is no readable regular file, is larger than `most`,
    or is not UTF-8."""
    try:
        return content(path, expected, todo, kind, most).decode("utf-8")
    except UnicodeDecodeError:
        raise kind(f"{path}: is not UTF-8", expected, todo or "save it as UTF-8") from None


def json_in(
    path: Path, expected: str, todo: str = "", kind: Kind = InputError, most: int = SMALL
) -> dict[str, Any]:
    """Return the JSON object in the file.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error
    - most: how many bytes the file may have

    Errors: an error of the class `kind` if the file cannot be read as text (`text`), or holds no
    JSON object."""
    return _table(path, json.loads, "JSON", expected, todo, kind, most)


def json_lines_in(path: Path, expected: str, todo: str = "") -> list[dict[str, Any]]:
    """Return the JSON objects in a file of at most LARGE bytes, which has one object on each line.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said

    Errors: InputError if the file cannot be read as text (`text`), or a line holds no JSON
    object."""

    def parse(source: str) -> dict[str, Any]:
        rows = [json.loads(line) for line in source.splitlines()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError
        return {"rows": rows}

    table = _table(path, parse, "JSON lines", expected, todo, InputError, LARGE)
    rows: list[dict[str, Any]] = table["rows"]
    return rows


def toml_in(path: Path, expected: str, todo: str = "", kind: Kind = InputError) -> dict[str, Any]:
    """Read a TOML file of at most TABLES bytes, and return its content: key or table's name ->
    value.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error

    Errors: an error of the class `kind` if the file cannot be read as text (`text`), or is not
    TOML."""
    return _table(path, tables, "TOML", expected, todo, kind, TABLES)


def tables(source: str) -> dict[str, Any]:
    """Parse a text as TOML, and return its content as a dict. A text in which a key has too many
    parts (a.b.c...) is refused first, since tomllib would take very long. Errors: ValueError if the
    text is no TOML; RecursionError if it is nested too deep or has such a key."""
    if any(key[1] for key in _KEY.finditer(source)):
        raise RecursionError  # tomllib takes a time that is quadratic in a key's parts
    return tomllib.loads(source)


def is_sound(parsed: Any) -> bool:
    """Return whether a value parsed from JSON or TOML is nested no deeper than DEPTH, and all its
    texts can be encoded as UTF-8."""
    level = [parsed]
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


def _table(
    path: Path, parse: Any, form: str, expected: str, todo: str, kind: Kind, most: int
) -> dict[str, Any]:
    """Read a file as text, parse it with `parse`, and return the resulting dict.

    - path: the file that a person named
    - parse: the function that takes the text; its ValueError means that the text is malformed
    - form: the format's name for the error's text, such as "JSON"
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error
    - most: how many bytes the file may have

    Errors: an error of the class `kind` if the file cannot be read as text (`text`), or the result
    is no dict or is nested too deep."""
    source = text(path, expected, todo, kind, most)
    try:
        parsed = parse(source)
    except RecursionError:
        raise kind(f"{path}: nested too deep", expected, todo) from None
    except tomllib.TOMLDecodeError as error:  # its text says where; no TOML file holds a record
        raise kind(f"{path}: not valid TOML: {error}", expected, todo) from None
    except (ValueError, MemoryError):  # also a number of thousands of digits
        raise kind(f"{path}: not valid {form}", expected, todo) from None
    if not isinstance(parsed, dict):
        raise kind(f"{path}: not a JSON object", expected, todo)
    if not is_sound(parsed):
        raise kind(f"{path}: nested too deep, or not valid text", expected, todo)
    return parsed


def _open_descriptor(path: Path, expected: str, todo: str, kind: Kind) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    - path: the file that a person named
    - expected: what the file should be, as a noun phrase of the error's text
    - todo: what the person should do, for the error's text; "": nothing is said
    - kind: the class of the error

    Errors: an error of the class `kind` if it is no readable regular file."""
    if why := refuse_path(path):
        raise kind(f"{str(path)[:80]}: {why}", expected, todo)
    try:
        return descriptor(path)
    except FileNotFoundError:
        raise kind(f"{path}: no such file", expected, todo) from None
    except NotRegular as error:
        raise kind(f"{path}: is {error.strerror}", expected, todo) from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})", expected, todo) from None


def fingerprint(path: Path) -> str:
    """Return one sha256 (hexadecimal) over the name and content of a file or, if `path` is a
    folder, of each file directly in it, in the order of names. Return "" if there is no file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        if file.is_file():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest() if any(file.is_file() for file in files) else ""
