"""Read the cells of a row: texts, and keys in the form in which they are compared."""

from __future__ import annotations

from fedtune.core.data.files import Rejected
from fedtune.core.data.sources._interface import find_unclean


def text_of(value: object) -> str:
    """Return the string unchanged, spaces included. Errors: Rejected if it is empty or white
    space."""
    text = string_of(value)
    if not text.strip():
        raise Rejected("empty text")
    return text


def string_of(value: object) -> str:
    """Return a string as it is. Errors: Rejected for anything else."""
    if value is None:
        raise Rejected("missing value")
    if not isinstance(value, str):
        raise Rejected("wrong type")
    if reason := find_unclean(value):
        raise Rejected(reason)
    return value


def key_of(value: object) -> str:
    """Normalise a label or a patient's key: "7", " 7", 7 and 7.0 (a nullable integer column) are
    the same. Errors: Rejected."""
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
