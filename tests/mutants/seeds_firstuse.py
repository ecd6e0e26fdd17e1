"""Seeded bugs in what a site's own people see and decide: reviews, withdrawals, what is deleted."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

PURGE, REVIEW, WITHDRAW = (
    "fedtune/officer/purge.py",
    "fedtune/officer/review.py",
    "fedtune/officer/withdraw.py",
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
        '        alone(contents.state / "flower", "fedtune client"),\n', "",
        T_PURGE + "test_not_while_a_client_runs", "files go from under a running client",
    ),
    _one(
        "retention", "purge-beside-a-vault", PURGE,
        '        alone(contents.state / "ranks", "the vault of a client"),\n', "",
        T_PURGE + "test_not_while_a_client_runs",
        "the half on the network takes the client's lock away, and files go from under the other",
    ),
)  # fmt: skip
DECIDING_MUTANTS = (
    _one(
        "withdrawal", "a-mistyped-key-is-a-withdrawal", WITHDRAW,
        "bool(found or unseen or is_again", "bool(found >= 0 or unseen or is_again",
        T_CLI + "test_withdraw_of_a_key_that_nothing_here_has_is_an_error",
        "the patient stays in, and the person at the site believes otherwise",
    ),
    _one(
        "review", "a-study-counts-twice-in-its-review", REVIEW,
        "after = budget.total(budget.remaining(), _steps_of_queries(queries, budget))",
        "after = budget.total(plan.steps, _steps_of_queries(queries, budget))",
        T_CLI + "test_review_counts_a_study_once_and_says_when_every_round_is_paid_for",
        "what was paid for is added again",
    ),
    _one(
        "review", "doctor-forgets-what-was-spent", REVIEW,
        "    charges = pays.charges(name) if pays else []\n", "    charges = []\n",
        T_CLI + "test_doctor_says_no_where_review_says_no",
        "a plan that the ceiling refuses is found good",
    ),
    _one(
        "refusal", "a-refusal-reads-as-done", "fedtune/core/vault/reply_facts.py",
        'if status not in DONE:', 'if status == "failed":',
        "tests/client/test_reply_facts.py::test_a_refused_site_is_told_why",
        "the site's own screen says nothing of why it is out",
    ),
)  # fmt: skip
MEMBERSHIP, T_MEMBERSHIP = "fedtune/flower/membership.py", "tests/flower/test_membership.py::"
JOINING_MUTANTS = (
    _one(
        "joining", "an-answer-vouches-for-itself", MEMBERSHIP,
        "    if not fingerprint or not fingerprint.strip():\n",
        "    fingerprint = fingerprint or read(path, tls_key(keys), name).fingerprint\n"
        "    if not fingerprint.strip():\n",
        T_MEMBERSHIP + "test_nothing_is_kept_where_nobody_compared",
        "a site joins whoever sent the file",
    ),
    _one(
        "joining", "the-first-answer-is-for-ever", MEMBERSHIP,
        "answer = read(path, tls_key(keys), name, fingerprint)\n",
        "kept = load_answer(keys, name)\n"
        "    answer = read(path, tls_key(keys), name, '' if kept else fingerprint)\n",
        T_MEMBERSHIP + "test_another_consortiums_answer_is_refused_and_the_first_one_stays",
        "a site that has joined once joins anybody",
    ),
    _one(
        "joining", "anybodys-plan-is-reviewed", MEMBERSHIP,
        "        check_plan({", "        (lambda *_: None)({",
        T_MEMBERSHIP + "test_a_plan_that_another_key_signed_is_not_reviewed",
        "a person signs what the coordinator never planned",
    ),
    _one(
        "joining", "one-fingerprint-for-all", "fedtune/cli/network.py",
        "        for request in asked:\n            if not any(",
        "        for request in asked[:1]:\n            if not any(",
        "tests/test_network_cli.py::test_several_are_admitted_at_once_each_by_its_fingerprint",
        "a site that nobody heard is admitted with those that were",
    ),
    _one(
        "joining", "another-plan-than-the-reviewed-one", "fedtune/core/vault/reply_facts.py",
        'reviewed not in ("", facts["plan_digest"])', 'reviewed not in ("", reviewed)',
        "tests/client/test_reply_facts.py::"
        "test_a_plan_other_than_the_reviewed_one_is_shown_as_another",
        "a site trains what its people never read, and nobody is told",
    ),
    _one(
        "joining", "a-plan-of-an-earlier-study", "fedtune/launch/coordinator.py",
        "            (home / enrol.PLAN).unlink(missing_ok=True)  # an earlier study's plan\n", "",
        T_MEMBERSHIP + "test_the_plan_of_an_earlier_study_is_in_no_answer",
        "a site reviews what is not run",
    ),
)  # fmt: skip

MUTANTS = (*PURGE_MUTANTS, *DECIDING_MUTANTS, *JOINING_MUTANTS)
