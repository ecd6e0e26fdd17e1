"""Run Flower's own programs, each in a separate process."""

from __future__ import annotations

import sys

from fedtune.flower import api


def main(options: list[str]) -> None:
    """Run the program that sys.argv[0] names (SuperLink or SuperNode), with the options in the rest
    of sys.argv; does not return. options: that rest, which is not used."""
    api.run_program("superlink" if sys.argv[0] == "flower-superlink" else "supernode")
