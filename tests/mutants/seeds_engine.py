"""Seeded bugs in how rows are kept apart to the last bit."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

T = "tests/traps/test_trap_34_neighbours.py::"
CACHE, TOKENS = "fedtune/core/models/cache.py", "fedtune/core/objectives/_tokens.py"

MUTANTS: list[Mutant] = [
    one(
        34, "a-block-is-not-filled", CACHE,
        "return indices + indices[:1] * (size - len(indices))", "return indices",
        T + "test_nobody_moves_another_whatever_the_weights[1]",
        "a product's rows depend on how many there are",
    ),
    one(
        34, "no-bound-on-the-adapters-values", "fedtune/core/models/lora.py",
        "max(initial=0.0) > LARGEST", "max(initial=0.0) > np.inf",
        T + "test_an_adapter_that_could_tell_last_digits_is_refused",
        "weights that amplify last digits are loaded",
    ),
    one(
        34, "how-many-positions-follows-from-the-batch", CACHE,
        "return Bucket(length, tiles, padded_length(max_targets) if max_targets else 0, full)",
        "return Bucket(length, tiles, 0, full)",
        T + "test_records_of_other_counts_of_targets_share_no_block",
        "the head's rows follow from the neighbours' targets",
    ),
]  # fmt: skip
