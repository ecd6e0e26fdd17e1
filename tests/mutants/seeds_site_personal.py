"""Seeded bugs of a site's personal model: who can open it, on whom it trains, what hands it on."""

from __future__ import annotations

from tests.mutants.mutant import one

PERSONAL, REFUSAL = "fedtune/runs/personal.py", "fedtune/evidence/personal.py"
RECORDS, FIT, MAKE = (
    f"fedtune/officer/personalise/{name}.py" for name in ("records", "fit", "personalise")
)
TESTS = "tests/client/test_personalise.py::"

MUTANTS = (
    one(
        "personal",
        "the-key-is-the-same-everywhere",
        PERSONAL,
        'AESGCM(ledger.key.derive(f"{PURPOSE} {ledger.hashed(PURPOSE.encode())}"))',
        "AESGCM(bytes(32))",
        TESTS + "test_a_copy_opens_nowhere_else_and_a_changed_one_not_at_all",
        "whoever has the file has the model",
    ),
    one(
        "personal",
        "another-salt-opens-it",
        PERSONAL,
        'ledger.key.derive(f"{PURPOSE} {ledger.hashed(PURPOSE.encode())}")',
        "ledger.key.derive(PURPOSE)",
        TESTS + "test_after_a_restore_with_another_salt_it_is_trained_again",
        "a model goes on being used although a patient on whom it was trained has withdrawn",
    ),
    one(
        "personal",
        "others-may-read-the-file",
        PERSONAL,
        "replace(path, sealed, private=True)",
        "replace(path, sealed)",
        TESTS + "test_it_is_sealed_for_this_user_and_says_in_clear_what_it_is_alone",
        "other accounts of the machine copy it",
    ),
    one(
        "personal",
        "it-has-the-folder-of-its-run",
        PERSONAL,
        '        if name == "folder":\n            raise NeverLeaves(repr(self))\n',
        '        if name == "folder":\n            return self.shared.folder\n',
        TESTS + "test_an_opened_model_is_refused[merge]",
        "a merged model has what a site's patients said, without noise",
    ),
    one(
        "personal",
        "its-words-are-not-marked",
        PERSONAL,
        'return f"[personal model of {self.about.site}, {MARK}]"',
        'return ""',
        TESTS + "test_what_it_writes_is_marked",
        "words that no ε covers are taken for a released model's",
    ),
    one(
        "personal",
        "a-folder-of-them-is-no-personal-model",
        REFUSAL,
        "is_sealed(place) or (",
        "is_sealed(place) and (",
        TESTS + "test_so_is_its_file_and_the_folder_of_it[run]",
        "a command that is given one says that it is no run, and not what it is",
    ),
    one(
        "personal",
        "who-withdrew-stays-in-it",
        PERSONAL,
        "if any(unit in withdrawn for unit in about.units):",
        "if False:",
        TESTS + "test_after_a_withdrawal_it_is_not_used_until_it_was_trained_again",
        "a model of a patient who withdrew goes on being used",
    ),
    one(
        "personal",
        "new-opt-outs-are-not-noticed",
        PERSONAL,
        "if about.opt_outs != _opt_outs(site, ledger):",
        "if False:",
        TESTS + "test_after_a_change_of_the_opt_outs_too",
        "a model of a patient who opted out goes on being used",
    ),
    one(
        "personal",
        "who-is-held-out-trains-it",
        RECORDS,
        "and identity_of(record, by_patient) & held:",
        "and False:",
        TESTS + "test_whoever_is_held_out_is_never_trained_on",
        "a model is judged by patients on whom it was trained",
    ),
    one(
        "personal",
        "who-withdrew-trains-it",
        RECORDS,
        "            reasons[record.unit] = WITHDREW\n",
        "            pass\n",
        TESTS + "test_after_a_withdrawal_it_is_not_used_until_it_was_trained_again",
        "records of a patient who withdrew consent are read again",
    ),
    one(
        "personal",
        "who-trained-it-judges-it",
        "fedtune/officer/acceptance/records.py",
        "elif unit in taught:",
        "elif False:",
        TESTS + "test_it_is_not_judged_by_whom_it_was_trained_on",
        "a model is judged by patients whom it knows, once they are in another file",
    ),
    one(
        "personal",
        "the-audit-log-says-whether-it-was-kept",
        MAKE,
        '    acts.add("assess", "personalise", plan',
        '    acts.add("assess", "personalise", kept=choice.better, plan',
        TESTS + "test_the_audit_log_has_the_act_and_not_what_came_of_it",
        "a log that is handed to auditors tells an exact bit of patients",
    ),
    one(
        "personal",
        "a-fold-is-judged-by-a-fit-that-saw-it",
        FIT,
        "rows = [row for row in everyone if row not in held]",
        "rows = list(everyone)",
        TESTS + "test_no_fold_is_judged_by_a_fit_that_saw_it",
        "what was learnt by heart is taken for a gain",
    ),
    one(
        "personal",
        "records-of-a-patient-count-each",
        FIT,
        "_, patient = np.unique(units, return_inverse=True)",
        "patient = np.arange(len(units))",
        TESTS + "test_a_fit_to_noise_is_not_taken_for_better",
        "one patient with many records decides that a model is better",
    ),
)
