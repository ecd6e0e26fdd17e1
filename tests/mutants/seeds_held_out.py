"""Seeded bugs of held-out records that are asked about by class and by group."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

GROUPS, TABLE = "tests/test_held_out_groups.py::", "tests/report/test_held_out.py::"
SHOWN = "fedtune/report/held_out.py"

MUTANTS = (
    _one(
        "query", "a-units-vector-is-not-clipped", "fedtune/core/dp/mechanism.py",
        "clip.add_clipped(total, chunk, bound.grid, bound.norm, bound.mode, bound.gamma)",
        "clip.add_clipped(total, chunk, bound.grid, 1e9, bound.mode, bound.gamma)",
        GROUPS + "test_one_unit_moves_the_sums_by_no_more_than_the_norm",
        "a unit changes the sums by class and group by more than the noise is for",
    ),
    _one(
        "query", "each-record-counts-in-full", "fedtune/core/vault/evaluation.py",
        "self._pairs[record] / len(records)", "self._pairs[record]",
        GROUPS + "test_what_the_plan_does_not_name_counts_nowhere",
        "a patient with many records weighs as several, and is cut down in every cell",
    ),
    _one(
        "query", "rows-of-all-units-at-once", "fedtune/core/dp/query.py",
        "TOGETHER = 64", "TOGETHER = 2**62",
        GROUPS + "test_rows_are_made_for_some_units_at_once",
        "one unit more is what a machine's memory lacks for the rows of all of them",
    ),
    _one(
        "query", "a-value-that-nobody-named-is-the-first", "fedtune/core/data/group_reader.py",
        "return values.index(text) if text in values else NO_GROUP",
        "return values.index(text) if text in values else 0",
        GROUPS + "test_what_the_plan_does_not_name_counts_nowhere",
        "records decide what is told apart",
    ),
    _one(
        "query", "any-column-is-read", "fedtune/core/data/group_reader.py",
        'file.groups.get(name, "")', "file.groups.get(name, name)",
        GROUPS + "test_a_column_that_the_site_does_not_name_is_not_read",
        "a plan tells patients apart by what their site did not allow",
    ),
    _one(
        "query", "a-count-lost-in-noise-is-shown", SHOWN, "TOO_NOISY = 4.0", "TOO_NOISY = 0.0",
        TABLE + "test_splits_with_next_to_no_record_of_a_class_resolve_nothing",
        "a figure of a class of two records stands beside one of two hundred",
    ),
    _one(
        "query", "sites-are-ranked-by-their-figures", SHOWN,
        'row["interval"][0] > lower["interval"][1]', 'row["score"] > lower["score"]',
        TABLE + "test_splits_with_next_to_no_record_of_a_class_resolve_nothing",
        "how a split fell ranks hospitals",
    ),
    _one(
        "query", "each-interval-is-for-itself", SHOWN,
        "(2 * max(1, len(cells) * len(sums)))", "2",
        TABLE + "test_all_intervals_of_a_table_hold_together",
        "of many figures some lie apart by chance",
    ),
    _one(
        "query", "the-intervals-forget-the-noise", SHOWN,
        "room = variance * (1 + p**2) + count * p * (1 - p)", "room = count * p * (1 - p)",
        TABLE + "test_all_intervals_of_a_table_hold_together",
        "what is noise is taken for a difference",
    ),
    _one(
        "query", "masked-sites-have-figures", "fedtune/server/queries.py",
        "        if self.study.secure_aggregation is None:\n", "        if True:\n",
        TABLE + "test_with_secure_aggregation_no_site_has_a_figure_of_its_own",
        "sites that share one sum are compared with one another",
    ),
)  # fmt: skip
