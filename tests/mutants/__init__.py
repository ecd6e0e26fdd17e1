"""Seeded privacy bugs, one at a time, that the tests must kill: `python -m tests.mutants.run`."""
