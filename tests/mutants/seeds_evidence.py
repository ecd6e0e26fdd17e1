"""Seeded bugs in what a run proves to somebody who was not there."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

VERIFY, T = "fedtune/evidence/verify.py", "tests/test_verify.py::"
FORGED = "a forged report passes"

MUTANTS = (
    _one(
        "evidence", "a-file-is-not-hashed", VERIFY,
        "(run / name).is_symlink() or _sha256(run / name) != digest:", "(run / name).is_symlink():",
        T + "test_a_changed_byte_anywhere_is_refused", "files are changed after the signature",
    ),
    _one(
        "evidence", "a-file-is-added-to-the-adapter", VERIFY,
        "        if name not in files:\n", "        if not files:\n",
        T + "test_a_file_that_is_added_or_removed_is_named", "code beside the adapter's weights",
    ),
    _one(
        "evidence", "the-reports-epsilon-is-believed", VERIFY,
        "not number or not math.isclose(said, computed, rel_tol=SAME):", "not number:",
        T + "test_a_report_with_another_epsilon_is_refused_whoever_signs_it", FORGED,
    ),
    _one(
        "evidence", "a-round-without-signatures", VERIFY,
        "if said.get(number) != sorted(signed.get(number, [])):", "if number not in said:",
        T + "test_a_round_that_nobody_signed_is_refused", "rounds are made up",
    ),
    _one(
        "evidence", "a-step-log-of-another-body", VERIFY,
        'body=seal.digest_of(entry["arrays"], entry["said"]),',
        'body=json.loads(entry["header"])["body"],',
        T + "test_fewer_steps_than_were_signed_need_the_sites_key", "a log that no site signed",
    ),
    _one(
        "evidence", "whoever-signed-is-trusted", VERIFY,
        "    if not fingerprints.equal(trust, found.signer):", "    if not trust:",
        T + "test_who_replaces_every_key_is_refused_by_trust_alone", "a forger's own keys",
    ),
    _one(
        "evidence", "sealed-for-another-coordinator", VERIFY,
        "if enrolled and receiver != coordinator:", "if not receiver:",
        T + "test_a_consortiums_run_is_of_its_own_coordinator",
        "another consortium's updates under this one's name",
    ),
    _one(
        "evidence", "a-forged-run-is-exported", "fedtune/derive/export.py",
        "        verify(run.folder)\n", "        pass\n",
        T + "test_an_exported_model_carries_its_proof_and_a_forged_run_is_not_exported",
        "the model card repeats a false ε",
    ),
)  # fmt: skip
