"""Seeded bugs in what keeps private data from being declared public."""

from __future__ import annotations

from tests.mutants.mutant import one

STATED = "fedtune/core/vault/declared.py"
DECLARED, LOAD = "fedtune/core/ledger/declared.py", "fedtune/core/data/load.py"
TESTS = "tests/test_declared.py::"
OTHER_NAME = TESTS + "test_records_once_charged_are_refused_under_another_name"

MUTANTS = (
    one(
        "declared", "a-private-file-under-another-name", DECLARED,
        "        if private:\n", "        if private == len(records) + 1:\n", OTHER_NAME,
        "private records are trained on for nothing",
    ),
    one(
        "declared", "some-private-records-are-let-through", DECLARED,
        "        if private:\n", "        if private > 1:\n",
        OTHER_NAME, "one patient's record among public ones is not paid for",
    ),
    one(
        "declared", "a-private-name-declared-public", DECLARED,
        "    if dataset in charged:\n", "    if not charged:\n",
        TESTS + "test_the_same_name_is_refused_whatever_is_in_the_file",
        "a dataset that grew is relabelled",
    ),
    one(
        "declared", "hashes-of-private-records-are-not-written", LOAD,
        "        members.add(record_member(record))\n", "",
        TESTS + "test_the_hash_is_of_the_whole_record",
        "a relabelled short record is not known again",
    ),
    one(
        "declared", "a-client-with-declared-data", "fedtune/core/vault/declared.py",
        "if site.data.declared and not site.policy.allow_declared_data:",
        "if site.data.declared is None and not site.policy.allow_declared_data:",
        TESTS + "test_a_client_refuses_declared_data_unless_its_policy_allows_it",
        "a consortium's report counts invented records",
    ),
    one(
        "declared", "a-site-turns-public-in-mid-study", "fedtune/server/admission.py",
        "if self.declared.get(name, claim.what) != claim.what:", "if rank == -1:",
        TESTS + "test_a_site_cannot_turn_public_in_the_middle_of_a_study",
        "rounds on private records are reported as on public ones",
    ),
    one(
        "declared", "tried-for-free-then-private", DECLARED,
        "if not (shared := find_shared(ledger, dataset, records)):",
        "if (shared := find_shared(ledger, dataset, records)) is not None:",
        TESTS + "test_one_record_that_was_tried_for_free_is_enough",
        "a private file is tried for free before it is paid for",
    ),
    one(
        "declared", "a-question-takes-data-for-declared-that-is-not",
        "fedtune/core/vault/evaluation.py",
        "    permit_declared(current, site.home)\n", "",
        "tests/test_private_evaluation.py::"
        "test_records_that_became_private_in_mid_study_are_not_asked_about_for_nothing",
        "held-out records are paid from the ledger of one run where the site forbids it by now",
    ),
    one(
        "declared", "records-become-private-and-are-asked-about-for-nothing", STATED,
        'if getattr(data, "declared", None) != getattr(was, "declared", None):', "if False:",
        "tests/test_private_evaluation.py::"
        "test_records_that_became_private_in_mid_study_are_not_asked_about_for_nothing",
        "private held-out records are paid from the ledger of one run",
    ),
    one(
        "stated", "another-size-than-the-coordinator-was-told", STATED,
        'stated = loaded.model_copy(update={"site": table, "policy": current.policy})',
        "stated = current",
        "tests/client/test_site_refusals.py::"
        "test_what_a_site_stated_when_it_joined_stands_until_it_is_started_again",
        "q and σ are of another size than the statement beside them",
    ),
    one(
        "stated", "a-site-is-its-own-peer", "fedtune/core/vault/worker.py",
        "return pin_others(site.with_peers(site.policy.peers or self.peers), self.key.public)",
        "return site.with_peers(site.policy.peers or self.peers)",
        "tests/secagg/test_both_epsilons.py::test_a_sites_own_key_is_none_of_its_peers",
        "noise is shared with fewer sites than the plan says, and every draw is void",
    ),
    one(
        "query", "a-query-of-any-noise", "fedtune/core/vault/policy.py",
        "_about_protection(queries.own_noise, ", "_about_protection(None, ",
        "tests/test_private_evaluation.py::"
        "test_a_query_is_judged_by_its_own_figures_and_not_by_trainings",
        "an answer about held-out patients with less noise than the site allows",
    ),
    one(
        "declared", "a-restore-keeps-edited-hashes-of-declared-records",
        "fedtune/core/ledger/restore.py",
        'if entry.kind == "declaration" and "members" in entry.body:', "if entry.seq < 0:",
        "tests/dp/test_ledger_restore.py::"
        "test_a_ledger_whose_declared_members_were_edited_is_restored",
        "what a restore puts in place does not open, and the site's ledger is at its end",
    ),
    one(
        "declared", "a-restore-says-nothing-of-lost-records", "fedtune/core/ledger/restore.py",
        '        **({} if is_whole else {"members_lost": True}),\n', "",
        TESTS + "test_a_restore_asks_alike_whatever_was_lost",
        "what was tried for free with private records is forgotten with a lost ledger",
    ),
    one(
        "declared", "a-restored-site-joins-in-mid-study", "fedtune/officer/before_joining.py",
        "    check_restored(site)\n", "",
        TESTS + "test_after_a_restore_a_site_waits_for_a_person_in_mid_study_too",
        "private records that may have been tried for free train, and no person accepted it",
    ),
    one(
        "declared", "a-lost-declaration-is-none", "fedtune/core/ledger/account.py",
        "self.not_private_since[EVERY], self.members_lost = entry.seq, time",
        "self.members_lost = time",
        TESTS + "test_a_restore_forgets_no_declaration_without_a_word",
        "private records that were tried for free train once the ledger is restored",
    ),
    one(
        "declared", "a-copy-of-today-is-whole", "fedtune/core/ledger/restore.py",
        "    is_own = base.path == folder / DATABASE and anchor is not None\n",
        "    is_own = base.path is not None and anchor is not None\n",
        TESTS + "test_a_restore_asks_alike_whatever_was_lost",
        "whether a patient withdrew since the backup decides when a site comes back",
    ),
    one(
        "declared", "a-declaration-that-can-be-read-is-lost", "fedtune/core/ledger/restore.py",
        "        _enter_declarations(writer, sources, rows, key.public, base)\n", "",
        TESTS + "test_a_restore_forgets_no_declaration_without_a_word",
        "whoever accepts a restore accepts records that were tried for free, unseen",
    ),
    one(
        24, "a-restore-takes-the-anchor-away-first", "fedtune/core/ledger/restore.py",
        "os.link(folder / name, folder / f\"{name}{aside}\")",
        "os.replace(folder / name, folder / f\"{name}{aside}\")",
        "tests/dp/test_ledger_restore.py::"
        "test_a_restore_that_is_interrupted_and_begun_again_charges_no_less",
        "a restore that was killed and is begun again no longer knows how much was lost, and "
        "exhausts the budget",
    ),
    one(
        24, "a-round-without-noise-is-in-the-ledger-alone", "fedtune/core/vault/worker.py",
        "self.log.append(Step(study.digest, round_, 0.0, 1.0, 0.0, study.unit), steps)", "pass",
        "tests/client/test_site_refusals.py::"
        "test_a_round_without_noise_is_remembered_by_a_restored_ledger",
        "a restore states a finite ε of records that were trained on without noise",
    ),
    one(
        24, "a-second-attempt-at-a-round-is-logged-late", "fedtune/core/dp/steplog.py",
        "        self._round = None\n", "",
        "tests/dp/test_steplog.py::"
        "test_an_attempt_that_follows_one_that_broke_off_has_a_line_of_its_own",
        "a second attempt writes its line in mid-round, where a full disk can stop a step",
    ),
    one(
        "isolation", "a-database-over-tcp-takes-the-filter-away", "fedtune/core/isolation.py",
        "    return spaces & _install(filter_of_vault, families)\n",
        "    if socket.AF_INET in families:\n        return spaces\n"
        "    return spaces & _install(filter_of_vault, families)\n",
        "tests/isolation/test_isolation.py::"
        "test_a_vault_that_a_database_keeps_on_the_network_has_the_filter_all_the_same",
        "a vault on the network may trace processes, open raw sockets and use io_uring",
    ),
    one(
        34, "a-panic-of-a-library-leaves-out-every-row",
        "fedtune/core/training/unit_gradients.py",
        """        except BaseException as error:
            if not is_fault(error):
                raise
            log.error("rows of a block""",
        """        except Exception as error:
            log.error("rows of a block""",
        "tests/dp/test_gradients.py::"
        "test_a_library_that_panics_over_a_row_leaves_out_that_row_alone",
        "one patient's text decides whether anybody is in the sum",
    ),
    one(
        "consent", "a-restore-forgets-who-withdrew", "fedtune/core/ledger/restore.py",
        "sorted(set(stands.withdrawn) - base.withdrawn)", "sorted(set[str]())",
        "tests/client/test_withdraw.py::test_who_withdrew_stays_out_after_a_restore",
        "a patient who withdrew after the backup trains again, and nobody is told",
    ),
)  # fmt: skip
