"""How a process of fedtune begins: only code that is installed here runs, and no hub is asked.

`python -P boot.py MODULE OPTIONS` runs a module of this copy of fedtune in a process of its own.
The packages beside this file are found behind the standard library, and nothing is found in the
current folder: what lies beside somebody's study.toml is never run, whatever its name.

transformers and bitsandbytes fetch compiled kernels from a hub at import where the package
`kernels` is installed, and many a loader asks the hub for news of a file that it has. `cut_off`
runs before any of them is imported, here and in every child; fetching a base that a person named
is the one thing for which the hub is asked (bases/find.py)."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGES = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
STANDARD = os.path.dirname(os.__file__)


def command(module: str, *options: str) -> list[str]:
    """What starts `module` as __main__, under `environment`."""
    return [sys.executable, "-P", __file__, module, *options]


def environment() -> dict[str, str]:
    """This process' own, without what would let a child find modules in the current folder."""
    here = os.path.realpath(os.curdir)
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [each for each in asked if os.path.isabs(each) and os.path.realpath(each) != here]
    safe = {"PYTHONPATH": os.pathsep.join(kept), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **safe}


def main() -> None:
    standard = (STANDARD, os.path.join(STANDARD, "lib-dynload"))
    behind = max(n for n, folder in enumerate(sys.path, 1) if folder in standard)
    sys.path = [*sys.path[:behind], PACKAGES, *sys.path[behind:]]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


OURS = "FEDTUNE_OFFLINE"  # the hub was switched off here, not by the user


def cut_off() -> None:
    """Ask no model hub, and load no code of one, in this process and its children."""
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


if __name__ == "__main__":
    main()
