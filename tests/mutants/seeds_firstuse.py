"""Seeded bugs in what a site's own people see and decide: reviews, withdrawals, what is deleted."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

PURGE, REVIEW, WITHDRAW = (
    "fedtune/client/purge.py",
    "fedtune/client/review.py",
    "fedtune/client/withdraw.py",
)
T_PURGE, T_CLI = "tests/client/test_purge.py::", "tests/test_cli_site.py::"
LEFT = T_PURGE + "test_nothing_is_left_of_a_study_but_what_the_guarantee_needs"

PURGE_MUTANTS = (
    _one(
        "retention", "purge-forgets-the-rotated-log", PURGE,
        '"log.jsonl", "log.jsonl.1", ', '"log.jsonl", ', LEFT, "a file of a kind stays behind",
    ),
    _one(
        "retention", "purge-skips-what-was-listed", PURGE,
        "for path in contents.files:\n", "for path in contents.files[1:]:\n",
        LEFT, "one file of those listed stays behind",
    ),
    _one(
        "retention", "purge-takes-the-step-log", PURGE,
        '*("site.key", "salt", "steps.jsonl"),', '*("site.key", "salt"),',
        T_PURGE + "test_kept_is_never_a_kind", "a restored ledger charges by the step log",
    ),
    _one(
        "retention", "purge-while-a-client-runs", PURGE,
        'with alone(contents.state / "flower", "fedtune client"):', "if contents.state:",
        T_PURGE + "test_not_while_a_client_runs", "files go from under a running client",
    ),
)  # fmt: skip
DECIDING_MUTANTS = (
    _one(
        "withdrawal", "a-mistyped-key-is-a-withdrawal", WITHDRAW,
        "if not (datasets or in_file or unseen):\n", "if not (datasets or in_file is not None):\n",
        T_CLI + "test_withdraw_of_a_key_that_nothing_here_has_is_an_error",
        "the patient stays in, and the person at the site believes otherwise",
    ),
    _one(
        "review", "a-study-counts-twice-in-its-review", REVIEW,
        "ahead=_ahead(plan, charges)", "ahead=plan.steps",
        T_CLI + "test_review_counts_a_study_once_and_says_when_it_is_over",
        "what was paid for is added again",
    ),
    _one(
        "review", "doctor-forgets-what-was-spent", REVIEW,
        "    charges, steps = ledger.charges(site.data.name) if ledger else [], 0\n",
        "    charges, steps = [], 0\n",
        T_CLI + "test_doctor_says_no_where_review_says_no",
        "a plan that the ceiling refuses is found good",
    ),
    _one(
        "refusal", "a-refusal-reads-as-done", "fedtune/client/reply_facts.py",
        'if status not in DONE:', 'if status == "failed":',
        "tests/client/test_reply_facts.py::test_a_refused_site_is_told_why",
        "the site's own screen says nothing of why it is out",
    ),
)  # fmt: skip

MUTANTS = (*PURGE_MUTANTS, *DECIDING_MUTANTS)
