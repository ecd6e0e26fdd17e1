"""Seeded bugs in what a run proves to somebody who was not there."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

VERIFY, FIGURES = "fedtune/evidence/verify.py", "fedtune/evidence/figures.py"
T, ATTACKS = "tests/test_verify.py::", "tests/test_verify_attacks.py::"
FORGED = "a forged report passes"
AUDIT, T_AUDIT = "fedtune/core/ledger/audit_log.py", "tests/test_audit_log.py::"
T_CUT = "tests/test_audit_log_cut.py::"
T_ATTACK = "tests/test_attack.py::"

T_RELEASED, T_GAIN = "tests/test_what_is_released.py::", "tests/report/test_gain.py::"

SITES, T_SITES = "fedtune/audit/site_inference.py", "tests/test_site_inference.py::"
RECEIVED = "fedtune/audit/received.py"

MUTANTS = (
    _one(
        "evidence", "a-round-that-was-released-twice-is-not-named", "fedtune/officer/claims.py",
        "if count > 1}", "if count > 8}",
        "tests/test_verify_sites.py::"
        "test_a_round_that_a_site_released_twice_is_named_and_nobody_is_accused",
        "a site is not told that a coordinator asked it for a round again",
    ),
    _one(
        "evidence", "a-crash-counts-as-an-answer", "fedtune/officer/claims.py",
        'if s.released and s.kind == "reserve")', 'if s.kind == "reserve")',
        "tests/test_verify_sites.py::"
        "test_a_round_that_a_site_released_twice_is_named_and_nobody_is_accused",
        "a site that crashed is told that it released a round twice",
    ),
    _one(
        "evidence", "a-student-may-hide-its-own-epsilon", FIGURES,
        """_require_least(path, f"{name}'s epsilon", site["epsilon"], site["own_epsilon"])""",
        "pass",
        ATTACKS + "test_a_students_own_epsilon_follows_from_its_logs_and_its_teachers_is_added",
        "a report of both trainings states less than the student alone spent",
    ),
    _one(
        "evidence", "a-student-with-a-teacher-is-refused", FIGURES,
        '"student_epsilon" not in teacher or', "True or",
        ATTACKS + "test_a_students_own_epsilon_follows_from_its_logs_and_its_teachers_is_added",
        "an honest run of a distilled student is refused as not genuine",
    ),
    _one(
        "evidence", "a-site-without-an-update-is-no-site", FIGURES,
        '{kind: of_site.get(name, []) for', '{kind: of_site[name] for',
        "tests/test_verify_sites.py::test_a_site_that_only_answered_queries_is_listed_as_absent",
        "an honest run is refused as not genuine",
    ),
    _one(
        "evidence", "answers-that-were-left-out-are-missed-by-nobody", "fedtune/officer/claims.py",
        "unanswered=sorted(answered - held)", "unanswered=[]",
        "tests/test_verify_sites.py::test_a_site_finds_that_its_paid_answers_were_left_out",
        "a run states that patients of held-out records paid nothing, and their site agrees",
    ),
    _one(
        "evidence", "an-answer-that-a-site-never-gave", "fedtune/officer/claims.py",
        '_require_released(run, content, ("answer", name), answered)', "{*answered}",
        "tests/test_verify_sites.py::test_a_site_finds_that_its_paid_answers_were_left_out",
        "a stolen key answers in a site's name, and the site finds its run in order",
    ),
    _one(
        "evidence", "a-site-trusts-the-others-for-what-it-paid", "fedtune/cli/verify.py",
        '        cost += "" if told.whatever is None else f" ({rounded_up(told.whatever)} whatever '
        'happens)"\n', "",
        "tests/test_verify_sites.py"
        "::test_a_site_is_told_what_shared_noise_cost_it_whatever_happens",
        "a site is told an ε that colluding sites make wrong",
    ),
    _one(
        "evidence", "a-declared-site-asks-its-ledger-for-life", "fedtune/officer/claims.py",
        "if site.data.declared and", "if False and",
        "tests/test_verify_sites.py::"
        "test_a_site_whose_data_is_declared_compares_the_runs_own_ledger",
        "an honest site is told that its signing key was stolen",
    ),
    _one(
        "evidence", "a-log-that-was-taken-away-was-never-there", AUDIT,
        "if len(entries) <= begun:", "if False:",
        T_AUDIT + "test_a_log_that_was_taken_away_is_missed",
        "a damaged audit log is moved away, and the next one passes for the whole",
    ),
    _one(
        "evidence", "a-new-log-does-not-say-that-it-is-one", AUDIT,
        'if last[0]["seq"] < begun:', "if False:",
        T_AUDIT + "test_a_log_that_was_taken_away_is_missed",
        "a log that is begun in place of another passes for the first",
    ),
    _one(
        "evidence", "a-refused-receipt-is-forgotten", "fedtune/core/ledger/chain.py",
        '            connection.execute("COMMIT")\n'
        '            connection.execute("BEGIN IMMEDIATE")\n'
        "            self._catch_up(connection)\n\n    def check_receipts",
        "            pass\n\n    def check_receipts",
        "tests/dp/test_ledger_files.py::"
        "test_a_first_receipt_that_shows_a_rollback_is_missed_too",
        "a site goes on without lost charges once the receipts' file is moved away",
    ),
    _one(
        "evidence", "a-receipt-is-entered-before-the-loss", AUDIT,
        'if last[0]["seq"] < begun:', 'if last[0]["seq"] < begun and event != "cut":',
        "tests/client/test_distrust.py::"
        "test_the_loss_is_entered_before_what_a_receipt_shows",
        "a consortium that was left with --distrust is trusted again once a receipt came",
    ),
    _one(
        "evidence", "a-log-that-lacks-its-oldest-file-passes", "fedtune/officer/leave.py",
        "        genuine = audit_log.verify(folder, audit_log.signer_at(folder), torn=True).entries"
        "\n",
        "        genuine = list(_entries(folder))\n",
        "tests/client/test_distrust.py::test_a_log_that_lacks_a_part_is_no_log",
        "whoever rotates the log away has a distrusted consortium trusted",
    ),
    _one(
        "evidence", "a-log-that-was-moved-away-had-no-freeze", "fedtune/officer/freeze.py",
        'if entry["event"] in (FREEZE, LIFT, CUT)]', 'if entry["event"] in (FREEZE, LIFT)]',
        "tests/client/test_restored.py::"
        "test_a_damaged_audit_log_that_was_moved_away_counts_as_frozen_too",
        "an incident that damages the audit log ends the freeze, once the log is moved away",
    ),
    _one(
        "evidence", "receipts-that-were-moved-away-are-not-missed", "fedtune/core/ledger/chain.py",
        "not (receipts.every or path.exists()) and has_receipts(connection)", "False",
        "tests/dp/test_ledger_files.py::test_receipts_that_were_moved_away_are_missed",
        "a receipt that shows a rollback is moved away, and what was spent is forgotten",
    ),
    _one(
        "evidence", "an-update-is-taken-to-point-the-other-way", RECEIVED,
        "= -(toward @ rows", "= (toward @ rows",
        T_SITES + "test_an_update_tells_whose_records_it_was_made_from",
        "each site's updates are said to tell nothing of it",
    ),
    _one(
        "evidence", "what-an-update-was-made-from-is-compared-with-it", RECEIVED,
        "compared = np.flatnonzero(~trains)", "compared = np.arange(len(trains))",
        T_SITES + "test_what_an_update_was_made_from_is_not_what_it_is_compared_with",
        "that a record was trained on, which epsilon is about, is said to be its site's style",
    ),
    _one(
        "evidence", "each-update-is-seen-beside-the-sum", RECEIVED,
        "    if study.secure_aggregation:\n        whole", "    if False:\n        whole",
        T_SITES + "test_with_secure_aggregation_the_sum_alone_is_received",
        "an attack on what nobody receives",
    ),
    _one(
        "evidence", "a-patients-records-are-exchanged-one-by-one", SITES,
        "    yield asked.sites[None]\n    first",
        "    yield asked.sites[None]\n"
        "    asked = Asked(asked.names, asked.sites, asked.classes, np.arange(len(asked.sites)))\n"
        "    first",
        T_SITES + "test_names_that_say_nothing_are_found_no_oftener_than_chance[4]",
        "four records of one patient are four findings",
    ),
    _one(
        "evidence", "sites-are-named-after-the-answer", SITES,
        "found, null = stacked[0], stacked[1:]\n", "found, null = stacked[1], stacked[1:]\n",
        T_SITES + "test_a_planted_style_is_found_in_its_class",
        "what a model learnt of a site is not found",
    ),
    _one(
        "evidence", "repeated-rounds-pass-for-missing-ones", "fedtune/evidence/figures.py",
        '[*log, _costliest(log) | {"steps": more}]',
        '[_costliest(log) | {"steps": study.training.rounds * study.training.local_steps}]',
        T + "test_a_round_that_was_repeated_counts_beside_the_rounds_that_are_missing",
        "an absent site is said to cost at most what it may well have exceeded",
    ),
    _one(
        "evidence", "missing-rounds-cost-what-the-first-one-did", "fedtune/evidence/figures.py",
        '_costliest(log) | {"steps": more}', 'log[0] | {"steps": more}',
        T + "test_a_round_that_was_repeated_counts_beside_the_rounds_that_are_missing",
        "a site that declared a smaller size since is said to cost less than it may have",
    ),
    _one(
        "evidence", "an-absent-site-trusts-the-other-sites", "fedtune/evidence/figures.py",
        'for name, shares in {"epsilon": honest, "fallback": 1}.items():',
        'for name, shares in {"epsilon": honest, "fallback": honest}.items():',
        T + "test_a_round_that_was_repeated_counts_beside_the_rounds_that_are_missing",
        "the ε that holds whatever happens is the one that needs honest sites",
    ),
    _one(
        "evidence", "what-was-left-out-is-not-counted", "fedtune/evidence/figures.py",
        "        if any(lacks.values()):\n", "        if False:\n",
        "tests/test_verify.py::test_what_a_coordinator_left_out_of_a_run_is_counted",
        "a run with a site's later rounds left out proves a lower ε, and nothing says so",
    ),
    _one(
        "evidence", "a-report-may-leave-the-teacher-out", FIGURES,
        "if teacher := study.objective.resolved.teacher_spec:", "if teacher := None:",
        ATTACKS
        + "test_a_students_own_epsilon_follows_from_its_logs_and_its_teachers_is_added",
        "a student is shown as a run without a teacher, at its own ε",
    ),
    _one(
        "evidence", "others-compose-what-the-report-says", FIGURES,
        '        _check_composed_steps(path, name, report["privacy"]["sites"][name], site)\n', "",
        ATTACKS + "test_what_others_compose_epsilon_from_follows_from_the_logs",
        "a merge of two verified runs states a fraction of the ε that was spent",
    ),
    _one(
        "evidence", "the-rate-is-a-coordinators-word", FIGURES,
        """f"{name}'s q", site.get("sampling_rate"), max(e["q"] for e in log))""",
        """f"{name}'s q", max(e["q"] for e in log), max(e["q"] for e in log))""",
        ATTACKS + "test_what_others_compose_epsilon_from_follows_from_the_logs",
        "a merge of two verified runs states a fraction of the ε that was spent",
    ),
    _one(
        "evidence", "private-queries-cost-nothing", FIGURES,
        '    claim["with_queries"] = queried\n', "",
        ATTACKS + "test_a_run_whose_sites_answered_a_private_evaluation",
        "who is in the held-out records too reads the ε of the updates alone",
    ),
    _one(
        "evidence", "worse-is-hidden", "fedtune/report/gain.py",
        "    lines = (_over_start(quality), _over_base(quality), _describe_release(quality))",
        "    lines = (_over_base(quality), _describe_release(quality))",
        T_GAIN + "test_what_was_added_to_public_text_is_said_everywhere",
        "what public text alone gave is said nowhere",
    ),
    _one(
        "evidence", "a-page-may-hide-worse", FIGURES,
        "        if line not in page.splitlines():", "        if not page.splitlines():",
        T_RELEASED + "test_a_page_that_hides_worse_is_refused",
        "report.md hides what its figures say",
    ),
    _one(
        "evidence", "whatever-is-released-passes", FIGURES,
        """    _require_equal(path, "released's model", model, expected)\n""", "",
        T_RELEASED + "test_an_edited_line_of_what_is_released_is_refused",
        "the figures that decided say another model",
    ),
    _one(
        "evidence", "the-trained-model-beside-is-not-signed", "fedtune/evidence/sign.py",
        'paths = [*sorted(inside.rglob("*")), trained, *sorted(trained.rglob("*"))]',
        'paths = [*sorted(inside.rglob("*"))]',
        T_RELEASED + "test_the_trained_model_beside_it_is_signed",
        "trained/ is replaced after the signature",
    ),
    _one(
        "evidence", "counts-of-one-site-are-reported", "fedtune/server/summary.py",
        "return progress.study.private and len(took_part) > 1", "return progress.study.private",
        T_RELEASED + "test_every_class_has_its_noised_count_and_what_is_recognised_of_it",
        "the report counts one site's units by class",
    ),
    _one(
        "evidence", "the-trained-models-figure-is-the-headline", "fedtune/server/summary.py",
        '"after": progress.started, TRAINED: quality["after"]',
        '"after": quality["after"], TRAINED: quality["after"]',
        T_RELEASED + "test_the_headline_figure_is_that_of_what_is_handed_out",
        "the figure shown is not of what is handed out",
    ),
    _one(
        "evidence", "a-file-is-not-hashed", VERIFY,
        " or _sha256(path) != digest:", ":",
        T + "test_a_changed_byte_anywhere_is_refused", "files are changed after the signature",
    ),
    _one(
        "evidence", "a-file-is-added-to-the-adapter", VERIFY,
        "        if name not in files:\n", "        if not files:\n",
        T + "test_a_file_that_is_added_or_removed_is_named", "code beside the adapter's weights",
    ),
    _one(
        "evidence", "the-reports-epsilon-is-believed", FIGURES,
        "not number or not math.isclose(said, computed, rel_tol=SAME):", "not number:",
        T + "test_a_report_with_another_epsilon_is_refused_whoever_signs_it", FORGED,
    ),
    _one(
        "evidence", "a-round-without-signatures", FIGURES,
        "if said.get(number) != sorted(signed.get(number, [])):", "if number not in said:",
        T + "test_a_round_that_nobody_signed_is_refused", "rounds are made up",
    ),
    _one(
        "evidence", "a-step-log-of-another-body", FIGURES,
        'body=seal.digest_of(entry["arrays"], said),',
        'body=header["body"],',
        T + "test_fewer_steps_than_were_signed_need_the_sites_key", "a log that no site signed",
    ),
    _one(
        "evidence", "whoever-signed-is-trusted", VERIFY,
        "    if trust and not fingerprints.match_fingerprints(trust, name):",
        "    if trust is None:",
        T + "test_who_replaces_every_key_is_refused_by_trust_alone",
        "a folder that a forger signed with keys of his own is trusted",
    ),
    _one(
        "evidence", "a-simulation-is-trusted", VERIFY,
        'trusted=bool(trust and signed["ca"]),', "trusted=bool(trust),",
        T + "test_epsilon_follows_from_what_the_sites_signed",
        "a folder that anybody can sign is shown as a consortium's",
    ),
    _one(
        "evidence", "a-simulation-ends-as-a-consortium", "fedtune/cli/verify.py",
        "if found.simulated and not simulation:",
        "if found.simulated and not (simulation or trust):",
        T + "test_the_command_trusts_nobody_by_itself",
        "the fingerprint that the folder itself shows is enough",
    ),
    _one(
        "evidence", "sealed-for-another-coordinator", FIGURES,
        "if enrolled and header[\"receiver\"] != coordinator:", "if not coordinator:",
        T + "test_a_consortiums_run_is_of_its_own_coordinator",
        "another consortium's updates under this one's name",
    ),
    _one(
        "evidence", "a-forged-run-is-exported", "fedtune/derive/export.py",
        "        check_signed(dossier or run.folder)\n", "        pass\n",
        T + "test_an_exported_model_carries_its_proof_and_a_forged_run_is_not_exported",
        "the model card repeats a false ε",
    ),
    _one(
        "evidence", "answers-count-as-updates", FIGURES,
        'if (said["status"], said["name"]) != (done, entry["site"]):', "if not said:",
        ATTACKS + "test_no_other_work_of_a_site_counts_as_an_update",
        "the step log of an answer to a query passes for that of an update",
    ),
    _one(
        "evidence", "a-round-is-left-out", FIGURES,
        "    if not signed or sorted(signed) != [*range(1, len(signed) + 1)] or not complete:",
        "    if signed is None:",
        ATTACKS + "test_a_coordinator_cannot_leave_a_round_out", "ε of fewer rounds than ran",
    ),
    _one(
        "evidence", "a-genuine-run-inside-a-false-one", VERIFY,
        "any(os.path.lexists(path / name) for name in names)", "is_signed(path)",
        ATTACKS + "test_a_genuine_run_inside_a_false_one_proves_nothing_of_it",
        "another run's proof is shown for this one",
    ),
    _one(
        "evidence", "steps-of-less-noise-are-forgotten", "fedtune/evidence/step_summary.py",
        "    return old <= new and old.total() < new.total()\n",
        "    return old.total() < new.total()\n",
        ATTACKS + "test_a_log_keeps_every_step_that_it_had",
        "a later step log that lacks the first steps passes",
    ),
    _one(
        "evidence", "a-unit-is-guessed-by-one-of-its-records", "fedtune/report/claim.py",
        "NormalDist().cdf(records * math.sqrt(steps)", "NormalDist().cdf(math.sqrt(steps)",
        "tests/report/test_report.py::"
        "test_a_unit_of_many_drawn_records_is_guessed_as_one_of_the_same_epsilon",
        "the bound on an attacker's guesses is proven for a k-th of what a patient may move",
    ),
    _one(
        "evidence", "a-report-may-say-that-a-unit-has-fewer-records", FIGURES,
        '        _require_equal(path, "records_per_unit", records, study.records_per_draw)\n', "",
        T + "test_a_report_with_other_records_of_a_unit_than_the_plans_is_refused",
        "a coordinator states a lower bound on an attacker's guesses than the plan has",
    ),
    _one(
        "evidence", "an-epsilon-is-rounded-twice", "fedtune/core/registry/rounding.py",
        "_rounded(n, digits, decimal.ROUND_CEILING)",
        "_rounded(round(n, 9), digits, decimal.ROUND_CEILING)",
        "tests/report/test_report.py::test_epsilon_is_rounded_up",
        "an ε that is a hair above what is shown looks smaller than it is",
    ),
    _one(
        "evidence", "a-forged-run-is-whole", "fedtune/runs/verify_model.py",
        "    check_signed(run)\n", "",
        ATTACKS + "test_nothing_is_made_of_a_forged_run", "models verify calls a forged run whole",
    ),
    _one(
        "evidence", "a-forged-teacher-is-reviewed", "fedtune/officer/review.py",
        "        check_teacher(study)\n", "        pass\n",
        ATTACKS + "test_a_teacher_that_is_not_as_it_was_signed_is_refused_where_a_person_reads",
        "a person signs a plan whose teacher says what nobody signed",
    ),
    _one(
        "audit log", "an-entry-may-be-taken-out", AUDIT,
        'entry["seq"] != len(entries) or entry["prev"] != prev', 'entry["seq"] < 0',
        T_AUDIT + "test_entries_that_were_moved_are_refused", "who admitted a site is taken out",
    ),
    _one(
        "audit log", "nobody-checks-who-signed", AUDIT,
        'PURPOSE + canonical(signed), entry["signature"]):', 'b"", "") and not signed:',
        T_AUDIT + "test_another_key_is_refused_also_with_a_whole_chain_of_its_own",
        "a log of somebody's own making",
    ),
    _one(
        "audit log", "a-damaged-first-line-is-a-wrong-type", AUDIT,
        "_read(first, where)['seq']", "json.loads(first)['seq']",
        T_AUDIT + "test_a_file_is_not_set_aside_by_a_first_line_that_is_no_entry",
        "a list of withdrawals ends after the first, and a freeze is never lifted",
    ),
    _one(
        "audit log", "a-signature-may-be-a-number", AUDIT,
        'if is_typed and isinstance(entry["signature"], str) and', "if is_typed and",
        T_AUDIT + "test_a_signature_of_another_type_is_none",
        "one changed line keeps a damaged ledger from being restored",
    ),
    _one(
        "audit log", "a-variable-names-who-did-it", AUDIT,
        "return pwd.getpwuid(os.getuid()).pw_name", 'return os.environ["LOGNAME"]',
        T_AUDIT + "test_a_log_verifies_and_says_who_when_and_under_which_rule",
        "a plan is signed under another's name",
    ),
    _one(
        "audit log", "a-reason-in-full", "fedtune/launch/coordinator.py",
        'reason_of(data["reason"])', 'str(data["reason"])',
        T_AUDIT + "test_what_a_study_decides_is_entered", "what a site said is kept for years",
    ),
    _one(
        "audit log", "an-update-leaves-unentered", "fedtune/core/vault/answers.py",
        '        note(site, "release",', '        note(site, "refuse",',
        T_AUDIT + "test_every_act_at_a_site_is_entered", "nobody can say what left",
    ),
    _one(
        "audit log", "a-token-without-the-log", "fedtune/core/vault/worker.py",
        "self.home.head_statement(audit, membership, coordinator)",
        'self.home.head_statement("", membership, coordinator)',
        T_CUT + "test_entries_that_were_cut_off_are_found_by_any_run_that_the_site_took_part_in",
        "what was cut off the log is missed by nobody",
    ),
    _one(
        "audit log", "a-receipt-is-not-compared", AUDIT,
        "        if not held:\n", "        if False:\n",
        T_CUT + "test_a_log_that_was_cut_off_in_mid_study_says_so_and_the_study_goes_on",
        "a log that was cut off goes on as if it were whole",
    ),
    _one(
        "attack", "half-a-secret-counts", "fedtune/audit/secret.py",
        "right = ((likeliest == targets) | ends).all(dim=1)",
        "right = ((likeliest == targets) | ends).any(dim=1)",
        "tests/dp/test_audit.py"
        "::test_secrets_that_were_not_trained_on_have_exposure_by_chance",
        "a guessed digit is reported as a secret that leaked",
    ),
    _one(
        "attack", "secrets-are-held-against-nothing", "fedtune/audit/attack.py",
        "return self.private.mean > self.allowed or bool(", "return bool(",
        T_ATTACK + "test_secrets_beyond_epsilon_are_caught",
        "secrets that leak beyond ε are reported as within it",
    ),
    _one(
        "attack", "the-bound-grows-with-nothing", "fedtune/audit/membership.py",
        "return self.auc[1] > self.auc_bound or self.surely_found > self.surely_allowed",
        "return self.auc[1] > 1.0",
        T_ATTACK + "test_a_mechanism_with_more_than_it_claims_is_caught",
        "an attack that breaks the claim is reported as within it",
    ),
    _one(
        "attack", "a-model-is-its-own-reference", "fedtune/audit/attack.py",
        "        there[t] = absent[t] = False\n", "",
        T_ATTACK + "test_a_models_own_side_does_not_tell_it",
        "a model is compared with itself, and guessing looks like an attack",
    ),
    _one(
        "attack", "a-sites-result-for-everybody", "fedtune/officer/attack.py",
        "(text + \"\\n\").encode(), private=True)", "(text + \"\\n\").encode())",
        T_ATTACK + "test_a_site_tells_its_own_from_others_where_nothing_protects_them",
        "exact counts of private records can be read by other users",
    ),
)  # fmt: skip
