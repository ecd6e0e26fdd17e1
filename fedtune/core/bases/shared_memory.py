"""Share one copy of a base's weights among all processes of this machine.

If a base is used in the type in which it is stored, the loader maps its files, and processes share
the pages. If it is converted, each process would hold its own copy. So the converted weights are
written once, to fedtune's cache folder, and mapped from there."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import locks

log = logging.getLogger("fedtune.models")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stored_as(files: list[Path], dtype: torch.dtype) -> bool:
    """Return whether every tensor of `files` is of `dtype`, so that nothing is converted."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        if kinds != {_NAMES.get(dtype)}:
            return False
    return True


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Run the block under a lock, so that the processes of this machine convert a base one after
    another, and do not all hold a copy at once. The lock is a file beside `path`; if it cannot be
    written, the block runs without a lock."""
    with ExitStack() as held:
        with suppress(OSError, InfrastructureError):
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locks.hold(path.with_suffix(".lock")))
        yield


def share(model: nn.Module, path: Path) -> None:
    """Replace the parameters of `model` with memory maps of the same values in `path`.

    Guarantee: not one bit of the model changes. A file that holds anything else (altered, cut off,
    of another version) is written anew. If it cannot be written, the model keeps its own copy."""
    parameters = dict(model.named_parameters())
    if _map_parameters(parameters, path) or (
        _write_parameters(parameters, path) and _map_parameters(parameters, path)
    ):
        _give_back()


def _write_parameters(parameters: dict[str, nn.Parameter], path: Path) -> bool:
    draft = path.with_suffix(".new")
    try:
        save_file({n: p.detach().contiguous() for n, p in parameters.items()}, draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()
        log.warning(
            "the converted base cannot be kept (%s), so each process holds a copy of its own",
            type(error).__name__,
        )
        return False
    return True


def _map_parameters(parameters: dict[str, nn.Parameter], path: Path) -> bool:
    """Map from the file `path` each parameter whose values it holds bit for bit. Return whether it
    holds all parameters."""
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(parameters):
                return False
            for name, parameter in parameters.items():
                mapped: torch.Tensor = file.get_tensor(name)
                if not _same(mapped, parameter.detach()):
                    return False
                parameter.data = mapped
    except (OSError, SafetensorError):
        return False
    return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def _give_back() -> None:
    """Return freed memory to the system, since glibc keeps what was freed among smaller blocks."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
