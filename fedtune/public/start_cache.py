"""Store results computed from public text on this machine, under a digest of everything on which
they depend.

The computation takes minutes to an hour. The stored result is found by a run that was interrupted
before its first round, and by the commands that review, check and start one study. No array here
comes from a site's records, and none costs ε."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.core.bases.find import cache_dir
from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.core.models.lora import Arrays

FOLDER = "public"  # in the cache folder of this machine
MOST_BYTES = 2**30  # all stored files together; the least recently used go first


def load_arrays(key: str) -> Arrays | None:
    """Load the arrays that are stored under `key`, name -> array; None if there is no readable
    file."""
    path = _path(key)
    try:
        arrays = load(path.read_bytes())
        os.utime(path)  # _prune removes the files with the oldest times
    except (OSError, SafetensorError, ValueError):
        return None
    return arrays


def keep(key: str, arrays: Arrays) -> None:
    """Store arrays under `key`. Then remove the files that were not used for longest, until the
    stored files have at most MOST_BYTES in all. If the arrays cannot be written, nothing is stored,
    and they are computed again next time."""
    with suppress(InfrastructureError, OSError):
        replace(_path(key), save(arrays), private=True)
        _prune()


def _path(key: str) -> Path:
    return cache_dir() / FOLDER / f"{key}.safetensors"


def _prune() -> None:
    files = sorted(_path("*").parent.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > MOST_BYTES:
            path.unlink()
