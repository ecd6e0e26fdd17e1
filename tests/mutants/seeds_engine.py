"""Seeded bugs in how rows are kept apart to the last bit."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

T = "tests/traps/test_trap_34_neighbours.py::"
SIDE_BY_SIDE = "tests/models/test_side_by_side.py::"
CORES, CORES_TESTS = "fedtune/core/models/cores.py", "tests/models/test_cores.py::"
CACHE, TOKENS = "fedtune/core/models/cache.py", "fedtune/core/objectives/_tokens.py"

MUTANTS: list[Mutant] = [
    one(
        34, "a-block-is-not-filled", CACHE,
        "return indices + indices[:1] * (size - len(indices))", "return indices",
        T + "test_nobody_moves_another_whatever_the_weights[1]",
        "a product's rows depend on how many there are",
    ),
    one(
        34, "a-machine-is-trusted-with-blocks", "fedtune/core/models/network.py",
        "if rows_keep_digits(self.modules, most, self.device):", "if True:",
        "tests/models/test_places.py::"
        "test_records_share_a_block_where_rows_keep_their_digits",
        "on a processor without AVX2 a row's last digits tell what lies beside it",
    ),
    one(
        34, "a-check-tries-a-head-of-zeros", "fedtune/core/training/local_round.py",
        "trainable=_scatter(network.trainable())", "trainable=network.trainable()",
        "tests/models/test_network.py::"
        "test_the_check_catches_a_head_whose_rows_follow_their_place",
        "a head whose rows follow their place passes, since all its products are zero",
    ),
    one(
        34, "a-block-is-whole-before-it-is-narrowed", "fedtune/core/models/cache.py",
        "heads = positions if self.network.pooled else heads", "heads = positions",
        "tests/models/test_places.py::test_a_block_is_whole_at_the_positions_that_are_left",
        "the last row of a narrowed block gets other digits, which IPO turns into a gradient",
    ),
    one(
        34, "a-product-whose-rows-follow-their-places", "fedtune/core/boot.py",
        'os.environ["MKL_CBWR"] = "AUTO,STRICT"', 'os.environ["MKL_CBWR"] = "AUTO"',
        "tests/models/test_products.py::test_where_mkl_is_told",
        "a reward head's last digits say which other records were drawn",
    ),
    one(
        34, "a-sigmoid-by-place", "fedtune/core/objectives/kto.py",
        "torch.exp(logsigmoid(-torch.where(is_desirable, gain, -gain)))",
        "1 - torch.sigmoid(torch.where(is_desirable, gain, -gain))",
        "tests/models/test_products.py::test_a_judged_completions_loss_follows_from_itself",
        "one more record changes others' rows by 4 %",
    ),
    one(
        34, "a-block-of-any-number-of-rows", CACHE,
        "        return 1 << rows.bit_length() - 1\n", "        return rows\n",
        "tests/models/test_products.py::test_twin_other_numbers_of_rows_follow_their_place",
        "the last rows of a block have other last digits than the same rows in front",
    ),
    one(
        34, "odd-widths-share-blocks", "fedtune/core/bases/architecture.py",
        "all(width % WIDTH == 0 for width in widths)", "bool(widths)",
        "tests/models/test_products.py::test_a_base_of_odd_widths_shares_no_block",
        "a hostile base's last rows in a block have other last digits",
    ),
    one(
        34, "no-bound-on-the-adapters-values", "fedtune/core/models/lora.py",
        "max(initial=0.0) > LARGEST", "max(initial=0.0) > np.inf",
        T + "test_an_adapter_that_could_tell_last_digits_is_refused",
        "weights that amplify last digits are loaded",
    ),
    one(
        34, "how-many-positions-follows-from-the-batch", CACHE,
        "return Bucket(length, tiles, targets, full)", "return Bucket(length, tiles, 0, full)",
        T + "test_records_of_other_counts_of_targets_share_no_block",
        "the head's rows follow from the neighbours' targets",
    ),
    one(
        34, "threads-start-with-their-blocks", CORES,
        "            pool.submit(all_run.wait)\n        all_run.wait()\n", "            pass\n",
        CORES_TESTS + "test_all_threads_start_before_the_first_block",
        "how many blocks a site has follows from the machine's counter of threads",
    ),
    one(
        3, "what-was-averaged-stays", "fedtune/core/training/unit_gradients.py",
        "            chunk.wipe()\n            raise\n", "            raise\n",
        "tests/dp/test_gradients.py::test_what_was_averaged_before_a_failure_is_overwritten",
        "un-noised gradients stay in freed memory when a block fails",
    ),
    one(
        3, "a-blocks-gradients-stay", "fedtune/core/training/unit_gradients.py",
        "            _wipe([*gradients, *made])\n            raise\n", "            raise\n",
        "tests/dp/test_gradients.py::"
        "test_a_blocks_gradients_are_overwritten_if_they_cannot_be_put_together",
        "un-noised gradients stay in freed memory when a block fails",
    ),
    one(
        34, "a-units-records-beside-each-other-again", "fedtune/core/training/unit_gradients.py",
        "not alone and self._engine.side_by_side", "self._engine.side_by_side",
        "tests/dp/test_gradients.py::"
        "test_a_unit_that_is_tried_again_has_nothing_beside_it_not_even_its_own_records",
        "a unit of several records takes part by how many cores the machine has",
    ),
    one(
        34, "those-that-wait-are-to-blame", CORES,
        "                    while waiting:\n                        yield _take_first(waiting)\n",
        "",
        CORES_TESTS + "test_a_block_that_cannot_be_made_fails_at_its_turn",
        "one file that fails takes records out that were computed beside it",
    ),
    one(
        34, "a-passage-is-not-tried-alone", CACHE,
        "                for row in groups[done]:\n                    self._compute_alone(row)\n",
        "",
        SIDE_BY_SIDE + "test_a_record_that_fails_beside_others_is_tried_alone",
        "a record for which memory was short beside another one takes no part",
    ),
    one(
        34, "a-block-has-all-operator-threads", CORES,
        "    torch.get_num_threads()\n    torch.set_num_threads(1)\n",
        "    torch.set_num_threads(1)\n",
        CORES_TESTS + "test_a_thread_keeps_its_one_thread_of_operators",
        "a row's last digits follow from its place in the block",
    ),
    one(
        34, "the-adapter-is-off-for-other-blocks", CORES,
        "beside = pool if may_share(block) else None", "beside = pool",
        CORES_TESTS + "test_the_adapter_is_off_in_the_callers_thread_alone",
        "what a pair's reference needs is done to the blocks beside it",
    ),
    one(
        34, "threads-share-what-they-collect", "fedtune/core/training/engines/one_pass.py",
        "class _OfThread(threading.local):", "class _OfThread:",
        CORES_TESTS + "test_what_a_thread_collects_is_its_own",
        "rows of one block are added to those of another",
    ),
    one(
        34, "a-block-that-nobody-takes-stays", CORES,
        "                    discard(result.result())\n", "                    pass\n",
        CORES_TESTS + "test_a_caller_who_stops_leaves_no_result",
        "un-noised gradients stay in freed memory",
    ),
    one(
        34, "arrow-starts-threads-for-columns", "fedtune/core/data/sources/parquet.py",
        "use_threads=False", "use_threads=True",
        "tests/data/test_parquet_threads.py::test_no_thread_starts_for_the_columns_of_a_file",
        "how many threads there are follows from how long each reading of a column takes",
    ),
    one(
        "hospital", "a-dataset-taken-out-stays-apart", "fedtune/core/vault/worker.py",
        "for other in sorted({*self.ledger.datasets} - {data.name}):",
        "for other in sorted({*apart} & {*self.ledger.datasets} - {data.name}):",
        "tests/client/test_disjoint_memberships.py::"
        "test_a_dataset_that_is_registered_no_more_is_apart_from_none",
        "what was paid for it counts against no other dataset",
    ),
]  # fmt: skip
