"""No code and no file of a model hub is loaded behind anybody's back.

transformers and bitsandbytes fetch compiled kernels from a hub at import where the package
`kernels` is installed, and many a loader asks the hub for news of a file that it has. `cut_off`
runs before any of them is imported, here and in every child; fetching a base that a person named
is the one thing for which the hub is asked (models/base.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OURS = "FEDTUNE_OFFLINE"  # the hub was switched off here, not by the user


def cut_off() -> None:
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        os.environ[OURS] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # no such module, to all


@contextmanager
def online() -> Iterator[None]:
    """The hub may be asked in the block, unless the user's own HF_HUB_OFFLINE says no."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and os.environ.get(OURS) != "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
