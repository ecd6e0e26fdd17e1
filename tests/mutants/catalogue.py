"""The seeded bugs: what is changed in which shipped file, and the tests that must fail for it.

Every numbered trap has at least one. Where a trap cannot exist here by design (there is no
BatchMemoryManager, no GDP accountant, no set_seed), the mutant brings it in.

Each area has a module, `seeds_AREA.py`, with its MUTANTS; what several name is in places.py."""

from __future__ import annotations

import importlib
import pkgutil

import tests.mutants
from tests.mutants.mutant import Mutant

MUTANTS: tuple[Mutant, ...] = tuple(
    mutant
    for module in sorted(m.name for m in pkgutil.iter_modules(tests.mutants.__path__))
    if module.startswith("seeds_")
    for mutant in importlib.import_module(f"tests.mutants.{module}").MUTANTS
)
