"""Recognise a site's personal model, and refuse to hand it on.

A personal model is computed from its site's patients without noise, so no ε covers it. It is stored
sealed in the site's state folder (runs/personal.py), and used only at the site. Every function that
makes something for others out of a finished run calls `refuse_personal` first."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.core.errors import Refused
from fedtune.core.files.reading import open_regular

MARK = "covered by no ε: it never leaves"
HEADER = f"fedtune-personal-1: a site's personal model, sealed to its key; {MARK}\n".encode()
SUFFIX = ".sealed"
FOLDER = "personal"  # in a site's state folder


class NeverLeaves(Refused):
    """Raised when a function that makes something for others is given a site's personal model,
    which must not leave the site."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: a personal model, {MARK}",
            "the released run",
            "use this model at its site, by `fedtune predict`, `evaluate`, `generate` or `accept` "
            "with RUN --site SITE; to pass something on, start a new study from the released run",
        )


def is_sealed(path: Path) -> bool:
    """Return whether `path` is a sealed personal model, whatever it is called."""
    try:
        with open_regular(path) as file:
            return file.read(len(HEADER)) == HEADER
    except (OSError, ValueError):
        return False


def refuse_personal(path: Path | str) -> None:
    """Raise NeverLeaves if `path` is a site's sealed personal model, or a folder that holds one;
    otherwise do nothing."""
    place = Path(path)
    if is_sealed(place) or (os.path.isdir(place) and any(map(is_sealed, place.glob(f"*{SUFFIX}")))):
        raise NeverLeaves(str(place))
