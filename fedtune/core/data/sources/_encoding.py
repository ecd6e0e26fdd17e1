"""Check that a text encoding is one in which a row's bytes cannot change how another row is
read."""

from __future__ import annotations

import codecs
import importlib
import re
from functools import partial
from pathlib import Path

from fedtune.core.data.sources._interface import UTF_16
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading

ASCII = "".join(map(chr, range(128)))


def encoding_of(name: str) -> str:
    """Return Python's name of an encoding: UTF-8, or one with a byte for each character that has
    ASCII's characters in ASCII's places.

    | utf-16, utf-7, shift_jis | ConfigError: a byte more or less shifts what follows |
    Errors: ConfigError."""
    try:
        known = codecs.lookup(name).name
    except (LookupError, ValueError):
        known = ""
    if known in ("utf-8", "utf-8-sig"):
        return "utf-8"
    if known in ("ascii", "iso8859-1"):
        return known
    try:
        module = importlib.import_module(f"encodings.{known.replace('-', '_')}") if known else None
    except ImportError:
        module = None
    if str(getattr(module, "decoding_table", ""))[:128] == ASCII:
        return known
    raise ConfigError(
        f"data.options.encoding = {name!r}",
        "utf-8, or an encoding of one byte a character, such as latin-1 or cp1252",
        "convert other files, as in: iconv -f UTF-16 -t UTF-8 FILE",
    )


_BEYOND_ASCII = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")


def all_of_a_byte(path: Path) -> bool:
    """Return whether the text is not UTF-8 and holds no UTF-8 character of several bytes: then
    each of its bytes is a character. Errors: OSError."""
    if found_encoding(path) != "not UTF-8":
        return False
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with reading.open_regular(path) as file:
        return not any(
            _BEYOND_ASCII.search(decoder.decode(chunk))
            for chunk in iter(partial(file.read, 2**20), b"")
        )


def found_encoding(path: Path) -> str:
    """Guess a text file's encoding from its bytes. Errors: OSError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with reading.open_regular(path) as file:
        head = file.read(3)
        if head.startswith(UTF_16):
            return "UTF-16"
        file.seek(0)
        try:
            while chunk := file.read(2**20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "not UTF-8"
    return "UTF-8 with a byte order mark" if head == codecs.BOM_UTF8 else "UTF-8"
