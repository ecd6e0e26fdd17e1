"""Run a module of this copy of fedtune in a process of its own: python -P boot.py MODULE OPTIONS.

The packages beside this file are found behind the standard library, and nothing is found in the
current folder: what lies beside somebody's study.toml is never run, whatever its name."""

from __future__ import annotations

import os
import runpy
import sys

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


if __name__ == "__main__":
    main()
