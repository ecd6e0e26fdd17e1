"""Run one of Flower's own programs, SuperLink or SuperNode, as the main program of a process."""

from __future__ import annotations

import sys

from fedtune.flower import api


def main(options: list[str]) -> None:
    """Run SuperLink or SuperNode, whichever sys.argv[0] names, until it ends. The program reads its
    options from the rest of sys.argv. options: the same options; not used here."""
    api.run_program("superlink" if sys.argv[0] == "flower-superlink" else "supernode")
