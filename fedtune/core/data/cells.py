"""Read the cells of a row as texts, or as keys in the form in which keys are compared."""

from __future__ import annotations

from fedtune.core.data.files import Rejected
from fedtune.core.data.sources._interface import find_unclean


def text_of(value: object) -> str:
    """Return the text in a cell unchanged, with its spaces. Errors: Rejected if the value is
    missing, is no string, is empty or white space only, or has a NUL or a lone surrogate."""
    text = string_of(value)
    if not text.strip():
        raise Rejected("empty text")
    return text


def string_of(value: object) -> str:
    """Check that a cell holds a text, and return it unchanged. Errors: Rejected if the value is
    missing, is no string, or has a NUL or a lone surrogate."""
    if value is None:
        raise Rejected("missing value")
    if not isinstance(value, str):
        raise Rejected("wrong type")
    if reason := find_unclean(value):
        raise Rejected(reason)
    return value


def key_of(value: object) -> str:
    """Return a label or a patient's key in the form in which they are compared: "7", " 7", 7 and
    7.0 (of a nullable integer column) are all "7". Errors: Rejected if the value is missing, and if
    it is neither a usable text nor a number."""
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
