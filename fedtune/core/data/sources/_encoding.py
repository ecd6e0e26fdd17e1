"""Find out in which encoding a text file is, and allow only encodings in which a row's bytes cannot
change how another row is read."""

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
    """Return Python's name of an encoding in which a damaged byte spoils one character only. These
    are UTF-8, and the encodings of one byte for each character whose first 128 characters are
    ASCII.

    Errors: ConfigError for every other one, such as utf-16, utf-7 and shift_jis."""
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
    """Return whether a text file seems to be in an encoding of one byte for each character: it is
    not UTF-8, and no bytes in it form a UTF-8 character of several bytes. Errors: OSError."""
    if found_encoding(path) != "not UTF-8":
        return False
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with reading.open_regular(path) as file:
        return not any(
            _BEYOND_ASCII.search(decoder.decode(chunk))
            for chunk in iter(partial(file.read, 2**20), b"")
        )


def found_encoding(path: Path) -> str:
    """Guess a text file's encoding from its bytes, and return a name for people: "UTF-16", "not
    UTF-8", "UTF-8" or "UTF-8 with a byte order mark". Errors: OSError."""
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
