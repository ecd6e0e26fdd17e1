"""Find a run's public start: the adapter or head that public records alone gave.

The public start is in the coordinator's checkpoint, and in a file of its own in a dossier, so that
a site can compare the model that it was given with what public records alone give. The run's
signature does not cover this file, but it covers the plan, which names the digest of the file's
arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtune.core.config import Study
from fedtune.core.files.writing import replace
from fedtune.core.models.lora import Arrays, digest

CHECKPOINT = Path("checkpoint") / "frozen.safetensors"  # the coordinator's file
ORIGIN = "origin/"  # in CHECKPOINT, the names of the start's arrays begin with this
START = "start.safetensors"  # the file in a dossier's run


def read_start(run: Path, study: Study) -> Arrays | None:
    """Read the arrays of a run's public start. Return None if the study has no [start], or if the
    folder `run` has no file whose arrays have the digest that the plan names."""
    if study.start is None or study.start.digest is None:
        return None
    for file, prefix in ((run / CHECKPOINT, ORIGIN), (run / START, "")):
        arrays = _load(file, prefix)
        if arrays and digest(arrays) == study.start.digest:
            return arrays
    return None


def write_start(arrays: Arrays, run: Path) -> None:
    """Write the arrays of a public start into the folder `run`, which is part of a dossier."""
    from safetensors.numpy import save

    replace(run / START, save(arrays))


def _load(file: Path, prefix: str) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if file.is_symlink() or not file.is_file():
        return {}
    try:
        saved = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError, MemoryError):
        return {}  # the last three are raised for types that NumPy lacks, and for files too large
    named = {name: array for name, array in saved.items() if name.startswith(prefix)}
    if any(array.dtype != np.float32 for array in named.values()):
        return {}
    return {name.removeprefix(prefix): array for name, array in named.items()}
