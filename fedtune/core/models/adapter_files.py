"""Load and save an adapter's files in a run folder: PEFT's files, and the head's file if there is a
head."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fedtune.core.errors import ModelError
from fedtune.core.files import reading
from fedtune.core.models.lora import Arrays
from fedtune.core.run_folder import HEAD

ADAPTER = "adapter_model.safetensors"  # PEFT's own name
AGAIN = "copy the run's folder again"


def load_adapter(folder: Path) -> Arrays:
    """Load all arrays of the folder in which a run's adapter is saved: those of PEFT's adapter file
    and of head.safetensors, whichever there are. Return them in a dict by the names that a network
    gives them. They are the trained arrays and LoRA's A, which may be frozen. Errors: ModelError if
    there is neither file, or one of them cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    adapter: Arrays = {}
    for file in (ADAPTER, HEAD):
        path = folder / file
        if not os.path.lexists(path):
            continue
        reading.regular(path, "the adapter of a run", AGAIN, ModelError)
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError, MemoryError) as error:
            raise ModelError(
                f"{path}: not a whole safetensors file ({type(error).__name__})", todo=AGAIN
            ) from None
        for name, value in arrays.items():
            peft_name = name.removesuffix(".weight") + ".default.weight"
            adapter[peft_name if file == ADAPTER else f"head.{name}"] = value
    if not adapter:
        raise ModelError(f"{folder}: holds no adapter", f"{ADAPTER} or {HEAD}", AGAIN)
    return adapter


def pick_arrays(saved: Arrays, names: Iterable[str], folder: Path) -> Arrays:
    """Return those of the saved arrays that a network asks for, in a dict by name.

    - saved: the saved arrays by name
    - names: the names that the network asks for
    - folder: where the arrays were saved, for the error's text

    Errors: ModelError if a name is missing in `saved`."""
    wanted = list(names)
    if missing := [name for name in wanted if name not in saved]:
        raise ModelError(
            f"{folder}: {len(missing)} arrays are missing, the first is {missing[0]}",
            "every array that the run's plan names",
            AGAIN,
        )
    return {name: saved[name] for name in wanted}
