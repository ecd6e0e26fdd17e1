"""Seeded bugs in what a run proves to somebody who was not there."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

VERIFY, FIGURES = "fedtune/evidence/verify.py", "fedtune/evidence/figures.py"
T, ATTACKS = "tests/test_verify.py::", "tests/test_verify_attacks.py::"
FORGED = "a forged report passes"
AUDIT, T_AUDIT = "fedtune/evidence/audit_log.py", "tests/test_audit_log.py::"
DOSSIER = "fedtune/evidence/dossier/"
CHECKS, RELEASES = "tests/dossier/test_verify_dossier.py::", "tests/dossier/test_release.py::"

MUTANTS = (
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
        "    if trust and not fingerprints.equal(trust, name):", "    if trust is None:",
        T + "test_who_replaces_every_key_is_refused_by_trust_alone", "a forger's own keys",
    ),
    _one(
        "evidence", "sealed-for-another-coordinator", FIGURES,
        "if enrolled and header[\"receiver\"] != coordinator:", "if not coordinator:",
        T + "test_a_consortiums_run_is_of_its_own_coordinator",
        "another consortium's updates under this one's name",
    ),
    _one(
        "evidence", "a-forged-run-is-exported", "fedtune/derive/export.py",
        "        check_signed(run.folder)\n", "        pass\n",
        T + "test_an_exported_model_carries_its_proof_and_a_forged_run_is_not_exported",
        "the model card repeats a false ε",
    ),
    _one(
        "evidence", "answers-count-as-updates", FIGURES,
        'if (said["status"], said["name"]) != (DONE[kind], entry["site"]):', "if not said:",
        ATTACKS + "test_no_other_work_of_a_site_counts_as_an_update",
        "the cheap log of the answers in place of the steps",
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
        "evidence", "steps-of-less-noise-are-forgotten", FIGURES,
        "    return old <= new and old.total() < new.total()\n",
        "    return old.total() < new.total()\n",
        ATTACKS + "test_a_log_keeps_every_step_that_it_had", "first steps are hidden",
    ),
    _one(
        "evidence", "a-forged-run-is-whole", "fedtune/models/loaded.py",
        "    check_signed(run)\n", "",
        ATTACKS + "test_nothing_is_made_of_a_forged_run", "models verify calls a forged run whole",
    ),
    _one(
        "evidence", "a-file-of-a-dossier-is-not-covered", DOSSIER + "seal.py",
        "        if name not in files:\n", "        if name not in files and name in RELEASE:\n",
        CHECKS + "test_a_file_that_is_added_removed_or_linked_is_named",
        "a page that nobody signed lies among the signed ones",
    ),
    _one(
        "evidence", "a-dossier-of-an-unverified-run", DOSSIER + "check.py",
        "    found = verify_run(folder / RUN, sites=sites)\n",
        "    found = Verified('', '', True, name, False, True)\n",
        CHECKS + "test_a_dossier_around_a_forged_run_is_refused", FORGED,
    ),
    _one(
        "evidence", "an-unverified-run-is-released", DOSSIER + "release.py",
        "    proven = verify_run(run)\n",
        "    proven = Verified('', '', True, '', False, True)\n",
        RELEASES + "test_a_run_that_does_not_verify_has_no_dossier", "a dossier of a forged report",
    ),
    _one(
        "evidence", "a-number-that-is-not-the-runs", DOSSIER + "content.py",
        '    return {"shown": show(value, how), "source": source, "how": how}\n',
        '    text = show(value, how) if how != "epsilon" else "0.5"\n'
        '    return {"shown": text, "source": source, "how": how}\n',
        CHECKS + "test_every_number_on_every_page_is_a_fact_of_the_run_or_the_packages_own",
        "a figure is written, not looked up",
    ),
    _one(
        "evidence", "facts-are-not-looked-up", DOSSIER + "facts.py",
        '        if said is None or said != fact.get("shown"):', "        if not source:",
        CHECKS + "test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it",
        "a coordinator's own ε in a dossier that verifies",
    ),
    _one(
        "evidence", "a-page-shows-what-it-likes", DOSSIER + "check.py",
        "        if numbers(shown) != numbers(text):", "        if not shown:",
        CHECKS + "test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it",
        "another ε on the page that people read",
    ),
    _one(
        "evidence", "an-approval-of-another-release", DOSSIER + "seal.py",
        '        if body["release"] != release:', '        if not body["release"]:',
        "tests/dossier/test_approve.py::"
        "test_an_approval_of_another_release_or_under_another_name_is_refused",
        "a yes to another folder counts for this one",
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
        "audit log", "an-update-leaves-unentered", "fedtune/client/answers.py",
        '        note(site, "release",', '        note(site, "refuse",',
        T_AUDIT + "test_every_act_at_a_site_is_entered", "nobody can say what left",
    ),
)  # fmt: skip
