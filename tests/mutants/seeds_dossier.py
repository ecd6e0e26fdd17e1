"""Seeded bugs in a run's dossier, and in a site's data sheet."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

DOSSIER = "fedtune/evidence/dossier/"
CHECKS, RELEASES = "tests/dossier/test_verify_dossier.py::", "tests/dossier/test_release.py::"
FORGED = "a forged report passes"

MUTANTS = (
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
        "evidence", "a-number-that-is-not-the-runs", DOSSIER + "content.py",
        '    return {"shown": show(value, how), "source": source, "how": how}\n',
        '    text = show(value, how) if how != "epsilon" else "0.5"\n'
        '    return {"shown": text, "source": source, "how": how}\n',
        RELEASES + "test_what_is_built_is_what_the_run_says", "a figure is written, not looked up",
    ),
    _one(
        "evidence", "an-attack-on-another-plan", DOSSIER + "release.py",
        'content.get("plan_digest") != report["plan_digest"]', "False",
        "tests/dossier/test_assurance.py::test_an_attack_of_another_study_or_on_a_sites_records_is_"
        "not_carried",
        "a dossier shows an attack on a plan with more noise",
    ),
    _one(
        "evidence", "facts-are-not-looked-up", DOSSIER + "facts.py",
        '        if said is None or said != fact.get("shown"):', "        if not source:",
        CHECKS + "test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it",
        "a coordinator's own ε in a dossier that verifies",
    ),
    _one(
        "evidence", "a-page-shows-what-it-likes", DOSSIER + "check.py",
        "same = shown == expected if same_release", "same = bool(shown) if same_release",
        CHECKS + "test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it",
        "another ε on the page that people read",
    ),
    _one(
        "evidence", "another-releases-pages-are-vouched-for", DOSSIER + "check.py",
        "return [CONTENT, *compared] if same_release else []", "return [CONTENT, *compared]",
        CHECKS + "test_the_pages_of_another_release_are_their_signers_word",
        "a dossier that names another release has another ε on every page, and verifies",
    ),
    _one(
        "evidence", "a-picture-shows-what-it-likes", DOSSIER + "check.py",
        "written | (drawings if same_release else {})", "written",
        CHECKS + "test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it",
        "another curve in the folder that people read",
    ),
    _one(
        "evidence", "an-approval-of-another-release", DOSSIER + "seal.py",
        '        if body["release"] != release:', '        if not body["release"]:',
        "tests/dossier/test_approve.py::"
        "test_an_approval_of_another_release_or_under_another_name_is_refused",
        "a yes to another folder counts for this one",
    ),
    _one(
        "evidence", "a-count-in-the-public-sheet", "fedtune/officer/sheet.py",
        "        replace(public, _json(public_sheet(typed, site.site.name)))\n",
        "        replace(public, _json(content))\n",
        "tests/client/test_sheet.py::"
        "test_the_public_sheet_is_what_was_typed_whatever_the_records_are",
        "how many patients a site has leaves it",
    ),
    _one(
        "evidence", "a-changed-file-joins", "fedtune/officer/sheet.py",
        "    if attested.get(what) != now:", "    if attested.get(what) is None:",
        "tests/client/test_sheet.py::test_records_that_changed_since_keep_a_site_from_joining",
        "records that nobody attested to are trained on",
    ),
    _one(
        "evidence", "a-sheet-without-the-fields-joins", "fedtune/core/vault/policy.py",
        "    for refusal in sheet_refusals(study, site):\n", "    for refusal in ():\n",
        "tests/client/test_sheet.py::test_a_site_without_the_fields_does_not_join",
        "records without a licence or a legal basis",
    ),
    _one(
        "evidence", "a-model-with-a-head-writes-text", "fedtune/core/run_folder.py",
        "    return (run / ADAPTER / HEAD).is_file()\n",
        "    return bool(load_plan(run).objective.labels)\n",
        "tests/dossier/test_card.py::test_both_cards_say_whether_the_model_writes_text",
        "a board reads that a reward model, or a plug-in's, is a text generator",
    ),
)  # fmt: skip
