"""Run Flower's own programs, each in a separate process."""

from __future__ import annotations

import sys

from fedtune.flower import api


def main(options: list[str]) -> None:
    """Run the SuperLink or the SuperNode that sys.argv[0] names, with the options that follow;
    does not return. options: the same."""
    api.run_program("superlink" if sys.argv[0] == "flower-superlink" else "supernode")
