"""Seeded bugs of an acceptance: who is judged on, what is kept of it, and what follows from few."""

from __future__ import annotations

from tests.mutants.mutant import one

RECORDS, ACCEPT, JUDGEMENT, INTERVALS = (
    f"fedtune/officer/acceptance/{name}.py"
    for name in ("records", "accept", "judgement", "intervals")
)
T_SITE = "tests/client/test_acceptance.py::"
T_FIGURES = "tests/client/test_acceptance_figures.py::"
TOLD, T_TOLD = "fedtune/evidence/told.py", "tests/client/test_told.py::"

MUTANTS = (
    one(
        "acceptance",
        "a-restore-is-in-no-decision",
        RECORDS,
        "max([*adopted, ledger.members_lost])",
        "max([*adopted, 0])",
        T_SITE + "test_a_decision_says_that_a_restore_may_have_lost_who_trained",
        "a signed decision by patients who trained says that they were left out",
    ),
    one(
        "acceptance",
        "a-gain-by-chance-is-accepted",
        INTERVALS,
        "Interval(min(low, found - half), max(high, found + half))",
        "Interval(low, high)",
        T_FIGURES + "test_a_gain_over_the_public_start_is_judged",
        "a model that is better on four patients of forty is taken for better",
    ),
    one(
        "acceptance",
        "any-file-is-the-public-start",
        "fedtune/report/start_file.py",
        "if arrays and digest(arrays) == study.start.digest:",
        "if arrays:",
        "tests/test_what_is_released.py::test_a_dossier_has_the_public_start_to_compare_with",
        "a gain is measured over another model than what public records gave",
    ),
    one(
        "acceptance",
        "who-is-in-the-training-file-is-judged-on",
        RECORDS,
        "m in trained or any(",
        "any(",
        T_SITE + "test_whoever_was_trained_on_is_left_out_with_all_records",
        "a model is judged by patients whom it knows",
    ),
    one(
        "acceptance",
        "who-was-ever-a-member-is-judged-on",
        RECORDS,
        "m in trained or any(test(m) for test in tests)",
        "m in trained",
        T_SITE + "test_whoever_was_trained_on_is_left_out_with_all_records",
        "a patient of an earlier study is judged on",
    ),
    one(
        "acceptance",
        "who-withdrew-is-judged-on",
        RECORDS,
        "in withdrawn:\n            reasons[record.unit] = WITHDREW",
        "in withdrawn:\n            pass",
        T_SITE + "test_whoever_withdrew_is_left_out",
        "records of a patient who withdrew consent are read again",
    ),
    one(
        "acceptance",
        "records-are-named-without-the-salt",
        RECORDS,
        'return ledger.hashed(b"acceptance\\0" + hashlib.sha256(b"".join(each)).digest())',
        'return hashlib.sha256(b"".join(each)).hexdigest()',
        T_SITE + "test_records_are_named_only_under_the_sites_salt",
        "whoever guesses the records knows them by the record of a decision",
    ),
    one(
        "acceptance",
        "the-decision-is-in-the-audit-log",
        ACCEPT,
        '        "assess",\n',
        '        "assess",\n        figures["decision"],\n',
        T_SITE + "test_the_audit_log_has_the_act_and_no_figure",
        "a log that is handed to auditors tells an exact bit of held-out patients",
    ),
    one(
        "acceptance",
        "others-may-read-the-figures",
        ACCEPT,
        '(text + "\\n").encode(), private=True)',
        '(text + "\\n").encode())',
        T_SITE + "test_the_record_is_signed_private_and_says_what_was_judged",
        "exact figures of patients are readable by every account of the machine",
    ),
    one(
        "acceptance",
        "the-decision-goes-with-the-run",
        ACCEPT,
        "    replace(folder / PAGE, page(figures, record).encode(), private=True)\n",
        "    replace(folder / PAGE, page(figures, record).encode(), private=True)\n"
        "    replace(run.folder / RECORD, content)\n",
        T_SITE + "test_the_record_is_signed_private_and_says_what_was_judged",
        "a run that is handed on tells an exact bit of held-out patients",
    ),
    one(
        "acceptance",
        "the-decision-is-in-the-ledger",
        ACCEPT,
        "    replace(folder / PAGE, page(figures, record).encode(), private=True)\n",
        "    replace(folder / PAGE, page(figures, record).encode(), private=True)\n"
        '    ledger.accept(site.data.name, login(), figures["decision"])\n',
        T_SITE + "test_nothing_of_it_is_in_what_a_site_shows_or_sends",
        "the head that goes with each update follows from what was decided",
    ),
    one(
        "acceptance",
        "a-scarce-class-decides",
        JUDGEMENT,
        "    if measure.macro:\n",
        "    if False:\n",
        T_FIGURES + "test_a_macro_figure_of_a_scarce_class_resolves_nothing",
        "a macro figure tells how a test set was split, and ranks hospitals by it",
    ),
    one(
        "acceptance",
        "few-patients-decide",
        JUDGEMENT,
        "    if patients < table.least_group:\n",
        "    if False:\n",
        T_FIGURES
        + "test_a_group_whose_labels_are_shuffled_is_found_and_one_of_eight_is_not_resolved",
        "eight patients are called a group",
    ),
    one(
        "acceptance",
        "comparisons-are-not-counted",
        JUDGEMENT,
        "level = 1 - ALARMS / max(1, sum(len(resolved) for _, _, resolved in tested))",
        "level = 1 - ALARMS",
        T_FIGURES + "test_without_a_difference_few_pages_find_one",
        "of many groups one is called different where none is",
    ),
    one(
        "acceptance",
        "records-count-as-patients",
        INTERVALS,
        "weight = float(counted.sum() ** 2 / max((counted**2).sum(), 1e-300))",
        "weight = float(counted.sum())",
        T_FIGURES + "test_many_records_of_a_patient_are_no_more_patients",
        "fifty records of a patient make the interval as narrow as fifty patients",
    ),
    one(
        "acceptance",
        "what-was-not-seen-cannot-be",
        INTERVALS,
        "        if not measure.errs or 0 < right.mean() < 1:\n",
        "        if True:\n",
        T_FIGURES + "test_ten_right_of_ten_prove_little",
        "thirty patients without an error prove a model perfect",
    ),
    one(
        "acceptance",
        "a-statement-needs-no-signature",
        TOLD,
        'or not verifies(key, PURPOSE + canonical(body), content["signature"])',
        "or not key",
        T_TOLD + "test_a_statement_that_was_changed_or_is_of_another_says_nothing",
        "a coordinator writes what a hospital decided",
    ),
    one(
        "acceptance",
        "a-statement-of-any-model-is-of-this-one",
        TOLD,
        'if (content["plan"], content["adapter"]) != (plan, adapter):',
        'if content["plan"] != plan:',
        T_TOLD + "test_a_statement_of_another_model_is_not_taken_for_this_ones",
        "what a hospital said of one model stands beside another",
    ),
    one(
        "acceptance",
        "what-was-judged-is-told",
        ACCEPT,
        'return Acceptance(figures["decision"], folder, figures)',
        """(run.folder / "told").mkdir(exist_ok=True)
    replace(run.folder / "told" / "own.json", state(record, ledger.key))
    return Acceptance(figures["decision"], folder, figures)""",
        T_TOLD + "test_nothing_is_told_unless_a_person_tells_it",
        "a decision about patients leaves with the run, and nobody told it",
    ),
    one(
        "acceptance",
        "a-statement-has-the-figures",
        TOLD,
        '        "key": key.public,\n',
        '        "key": key.public,\n        "records": record["records"],\n',
        T_TOLD + "test_a_statement_has_the_decision_and_no_figure",
        "who is handed a decision counts the patients",
    ),
)
