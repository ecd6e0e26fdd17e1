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
    one(
        34, "threads-follow-from-the-records", CACHE,
        "            filled = _fill_block(records, size)\n",
        "            filled = _fill_block(records, size)\n"
        "            torch.set_num_threads(2 if bucket.length <= 32 else self._threads)\n",
        "tests/guarantee/test_process_numbers.py::"
        "test_a_short_note_uses_up_no_number_of_a_process",
        "threads end and start where a note is short, and every account counts them",
    ),
    one(
        34, "arrow-starts-threads-for-columns", "fedtune/core/data/sources/parquet.py",
        "use_threads=False", "use_threads=True",
        "tests/data/test_parquet_threads.py::test_no_thread_starts_for_the_columns_of_a_file",
        "how many there are follows from how long the columns of each reading take",
    ),
]  # fmt: skip
