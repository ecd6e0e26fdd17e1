"""Run Flower's own programs, each in a separate process."""

from __future__ import annotations

import sys

from fedtune.flower import api


def main(options: list[str]) -> None:
    """Run the program that sys.argv[0] names (SuperLink or SuperNode) until it ends. The program
    reads its options from the rest of sys.argv. options: the same options, not used here."""
    api.run_program("superlink" if sys.argv[0] == "flower-superlink" else "supernode")
