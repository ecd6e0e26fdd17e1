"""Read a cell of a row as a text, or as a key: a label or a patient in the one form in which these
are compared."""

from __future__ import annotations

from fedtune.core.data.files import Rejected
from fedtune.core.data.sources._interface import find_unclean


def text_of(value: object) -> str:
    """Return the text in a cell unchanged, with its spaces. Errors: Rejected if the value is
    missing, is no string, is empty or white space only, or has a NUL or a lone surrogate (half of a
    UTF-16 pair)."""
    text = string_of(value)
    if not text.strip():
        raise Rejected("empty text")
    return text


def string_of(value: object) -> str:
    """Return the text in a cell unchanged; it may be empty. Errors: Rejected if the value is
    missing, is no string, or has a NUL or a lone surrogate (half of a UTF-16 pair)."""
    if value is None:
        raise Rejected("missing value")
    if not isinstance(value, str):
        raise Rejected("wrong type")
    if reason := find_unclean(value):
        raise Rejected(reason)
    return value


def key_of(value: object) -> str:
    """Return a label or a patient's key in the form in which two of them are compared: "7", " 7", 7
    and 7.0 (an integer in a column with missing cells is read as 7.0) are all "7". Errors: Rejected
    if the value is missing, or is neither a usable text nor a number."""
    if isinstance(value, float):
        if value != value:
            raise Rejected("missing value")
        value = int(value) if value.is_integer() else value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    key = string_of(value).strip()
    if not key:
        raise Rejected("missing value")
    return key
