"""Bugs where a site with a ledger of its own becomes a membership of a hospital."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

ADOPT, CLOSED = "fedtune/officer/adopt.py", "fedtune/officer/closed_ledger.py"
HOMES, OPENING = "fedtune/homes/known_homes.py", "fedtune/homes/opening.py"
T_ADOPT = "tests/client/test_adopt.py::"
T_COLUMNS = "tests/client/test_patient_columns.py::"
T_WITHDRAW = "tests/client/test_withdraw.py::"
T_HOMES = "tests/client/test_known_homes.py::"

MUTANTS = (
    one(
        "hospital", "a-damaged-ledger-is-no-home", HOMES,
        "if traces(Path(home)) != [KEY]", 'if (Path(home) / "ledger.head").exists()',
        T_HOMES + "test_a_home_whose_ledger_is_damaged_pays_all_the_same",
        "a second ledger is begun for the same patients before the first is restored",
    ),
    one(
        "hospital", "an-unmounted-home-is-begun-anew", HOMES,
        "(here[0] in keys if here else bool(traces(home)))",
        "(here[0] in keys if here else True)",
        T_HOMES + "test_a_home_that_is_not_mounted_is_not_begun_anew",
        "a ledger whose volume is not mounted is forgotten with all that it paid",
    ),
    one(
        "hospital", "a-new-ledger-passes-for-the-old-one", HOMES,
        "(here[0] in keys if here else bool(traces(home)))",
        "(True if here else bool(traces(home)))",
        T_HOMES + "test_a_home_that_is_not_mounted_is_not_begun_anew",
        "a command begins a ledger in the empty folder, and the site then pays from that one",
    ),
    one(
        "hospital", "a-withdrawal-below-a-volume", OPENING,
        "    check_ledger_there(home)\n    return Ledger(home)\n", "    return Ledger(home)\n",
        T_HOMES + "test_no_command_begins_a_ledger_in_a_folder_that_is_not_mounted[withdraw]",
        "a withdrawal is entered in a new ledger, which the mounted volume then hides",
    ),
    one(
        "hospital", "a-ledger-below-a-volume-is-none", OPENING,
        "    check_ledger_there(home)\n    return Ledger(home) if", "    return Ledger(home) if",
        T_HOMES + "test_nobody_withdrew_is_not_said_of_a_ledger_that_is_not_mounted",
        "preferences are written from the records of patients who withdrew",
    ),
    one(
        "hospital", "a-command-opens-a-ledger-unasked", "fedtune/officer/acceptance/accept.py",
        "ledger = open_ledger(site.site.ledger or site.home)\n    scored",
        "from fedtune.core.ledger.ledger import Ledger\n"
        "    ledger = Ledger(site.site.ledger or site.home)\n    scored",
        "tests/test_structure.py::test_ledgers_are_opened_in_one_place",
        "a model is judged on patients who withdrew, or on whom it was trained",
    ),
    one(
        "hospital", "a-personal-model-of-a-ledger-below-a-volume",
        "fedtune/officer/personalise/personalise.py",
        "    ledger = open_ledger(site.site.ledger or site.home)\n    own",
        "    from fedtune.core.ledger.ledger import Ledger\n\n"
        "    ledger = Ledger(site.site.ledger or site.home)\n    own",
        "tests/client/test_personalise.py"
        "::test_on_a_ledger_that_is_not_mounted_nobody_is_trained_on",
        "a model is trained on patients who withdrew",
    ),
    one(
        "hospital", "an-adopted-ledgers-records-are-anybodys", HOMES,
        "if added := [note for note in own if note not in noted]:", "if added := list[Note]():",
        T_HOMES + "test_the_home_that_adopted_a_ledger_is_known_before_its_membership_runs",
        "a second ledger is begun for the same patients before the membership runs",
    ),
    one(
        "hospital", "a-home-is-forgotten-with-another", HOMES,
        'stays = "" if own in names and is_lost else own', 'stays = "" if is_lost else own',
        T_HOMES + "test_to_forget_another_home_does_not_forget_ones_own",
        "a new ledger is begun in the folder on which the old one's volume is not mounted",
    ),
    one(
        "hospital", "an-adopted-log-counts-as-taken-away", ADOPT,
        "(state / audit_log.LOCK).unlink(missing_ok=True)", "pass",
        T_ADOPT + "test_the_log_of_a_ledger_that_was_adopted_does_not_count_as_taken_away",
        "whoever asks the old folder's log learns that somebody removed it",
    ),
    one(
        "hospital", "an-adopted-refusal-is-in-no-paper", ADOPT,
        'acts.add("refuse", "--adopt", plan=study, round=round_, adapter=adapter)', "pass",
        T_ADOPT + "test_a_refusal_for_good_and_what_was_sent_come_along[onco]",
        "a restore of the home makes an answer again that a person refused for good",
    ),
    one(
        "hospital", "a-restored-charge-is-not-adopted", CLOSED,
        "                listed.append(Earlier(EVERY, charge, spent.adapter))\n", "",
        T_ADOPT + "test_unknown_stays_unknown_and_what_a_restore_entered_counts_for_newcomers",
        "what a restore had entered is forgotten with the old ledger",
    ),
    one(
        "hospital", "a-restored-charge-is-one-datasets", CLOSED,
        "listed.append(Earlier(EVERY, charge, spent.adapter))",
        "listed.append(Earlier(names[self.datasets[0]], charge, spent.adapter))",
        T_ADOPT + "test_unknown_stays_unknown_and_what_a_restore_entered_counts_for_newcomers",
        "a patient whose arrival a restore lost comes back to a budget of which nothing is spent",
    ),
    one(
        "hospital", "a-link-is-adopted", ADOPT,
        "if link := next((p for p in _files_of(state) if p.is_symlink()), None):",
        "if link := None:",
        T_ADOPT + "test_a_ledger_with_a_link_is_not_adopted",
        "a patient's receipt is in neither the home nor the copy",
    ),
    one(
        "hospital", "an-adopted-charge-is-known", CLOSED,
        "charge = replace(spent.charge, membership=membership, adopted=True)",
        "charge = replace(spent.charge, membership=membership, adopted=True, rules=2)",
        T_ADOPT + "test_unknown_stays_unknown_and_what_a_restore_entered_counts_for_newcomers",
        "a charge of unknown ε gets one by moving",
    ),
    one(
        "hospital", "an-adoption-pays-twice", "fedtune/core/ledger/ledger.py",
        "one in enumerate(earlier[len(there) :], len(there)):", "one in enumerate(earlier):",
        T_ADOPT + "test_a_later_site_that_went_on_after_a_kill_pays_for_the_rest",
        "an adoption that was killed charges everything again",
    ),
    one(
        "hospital", "who-withdrew-without-a-record-comes-back", ADOPT,
        "if left := set(old.withdrawn) - set(found.values()):", "if left := set[str]():",
        T_ADOPT + "test_a_withdrawal_without_a_record_is_refused_until_its_key_is_given",
        "a withdrawal stays behind in the old ledger, under its salt",
    ),
    one(
        "hospital", "who-left-the-files-paid-nothing", ADOPT,
        'return {dataset: f"{name}/{there}" for dataset, there in sorted(names.items())}',
        "return names",
        T_ADOPT + "test_what_a_later_site_paid_counts_alike_whoever_is_in_its_files",
        "a patient who comes back is a newcomer, and pays for nothing before",
    ),
    one(
        "hospital", "a-new-receipt-forgets-a-release", "fedtune/officer/withdraw.py",
        "spent.dataset in datasets or spent.dataset not in known",
        'spent.dataset in datasets or spent.kind == "restore"',
        T_ADOPT + "test_what_a_later_site_paid_counts_alike_whoever_is_in_its_files",
        "a patient is not told which models keep something",
    ),
    one(
        "hospital", "an-adopted-charge-goes-by-another-datasets-column",
        "fedtune/core/ledger/entries.py",
        "columns.get(self.own_dataset) or", "columns.get(self.dataset) or",
        T_COLUMNS + "test_an_adopted_charge_is_by_the_column_of_its_own_dataset",
        "a corrected column is unseen: ε = 1.912 where 15.15 is true",
    ),
    one(
        "hospital", "an-adopted-column-must-be-called-as-every-other",
        "fedtune/core/ledger/entries.py",
        "columns.get(self.own_dataset) or columns.get(dataset", "columns.get(dataset",
        T_COLUMNS + "test_another_name_of_an_adopted_column_keeps_nobody_waiting",
        "after an adoption every study waits for a person, although nothing was corrected",
    ),
    one(
        "hospital", "an-adopted-column-is-forgotten", ADOPT,
        "data.cohort, columns=now)", "data.cohort)",
        T_COLUMNS + "test_an_adopted_dataset_that_has_a_column_keeps_it",
        "the column is taken out, and everybody who withdrew trains again, record by record",
    ),
    one(
        "hospital", "an-earlier-column-is-not-adopted", ADOPT,
        "for column in (now[name], *earlier) if earlier else ():", "for column in ():",
        T_COLUMNS + "test_an_adopted_dataset_keeps_that_it_had_a_column",
        "a study on records reads whoever withdrew by a column of the site's own ledger",
    ),
    one(
        "hospital", "a-disjoint-datasets-column-is-adopted", ADOPT,
        "- named - {*apart.get(table.name, ())}", "- named",
        T_COLUMNS + "test_a_dataset_that_was_disjoint_before_an_adoption_is_so_after_it",
        "a dataset that shares no patient has no study on records any more after an adoption",
    ),
    one(
        "hospital", "a-dataset-that-is-gone-is-taken-for-another", ADOPT,
        "_find_free(dataset, name, {*taken, *names.values()})", "dataset",
        T_COLUMNS + "test_an_adopted_dataset_that_is_gone_has_no_column_of_the_home",
        "a charge is compared with the column of a dataset that it has nothing to do with",
    ),
    one(
        "hospital", "a-share-shows-nothing-earlier", "fedtune/core/ledger/spending.py",
        "charge.is_paid_by(policy.own_memberships)", "charge.is_paid_by({policy.membership})",
        T_ADOPT + "test_the_first_sites_ledger_becomes_the_hospitals",
        "a person sees a share that the vault knows is spent",
    ),
    one(
        "hospital", "a-second-home-joins", HOMES,
        "if other == own or noted is None:", "if True:",
        T_HOMES + "test_a_second_home_of_the_same_records_is_refused_and_told_the_way_out",
        "two ledgers each state a part of what a patient has paid",
    ),
    Mutant(
        "hospital", "a-link-leads-to-another-place", HOMES,
        (
            ('if [found.st_dev, found.st_ino] == [note["device"], note["inode"]]:', "if False:"),
            ("if noted.exists() and os.path.samestat(found, noted.stat()):", "if False:"),
        ),
        (T_HOMES + "test_the_same_place_is_known_by_whatever_path",),
        "the same records under another name are paid for anew",
    ),
    one(
        "hospital", "a-site-beside-a-home-declares-its-records", HOMES,
        "for table in (site.data, site.evaluation) if table]",
        "for table in (site.data, site.evaluation) if table and not table.declared]",
        T_HOMES + "test_what_a_home_pays_for_is_not_declared_by_a_site_beside_it",
        "records that were charged as private are tried for free",
    ),
    one(
        "hospital", "a-renamed-file-is-another-place", HOMES,
        'if [found.st_dev, found.st_ino] == [note["device"], note["inode"]]:', "if False:",
        T_HOMES + "test_a_renamed_file_is_known_though_another_has_its_name",
        "a second ledger pays for the same records, under another name",
    ),
    one(
        "hospital", "a-simulation-of-a-homes-records-asks-nobody", "fedtune/launch/simulate.py",
        "        check_simulated(site)\n", "        pass\n",
        T_HOMES + "test_what_a_home_pays_for_is_not_simulated_by_a_site_beside_it",
        "records that a home pays for are declared generated, and trained on for free",
    ),
    one(
        37, "an-acceptance-covers-what-was-disjoint", "fedtune/core/ledger/entries.py",
        "if self.against is not None and spent.seq > self.against.get(spent.dataset, -1):",
        "if False:",
        T_COLUMNS + "test_an_acceptance_holds_for_the_charges_that_counted_then",
        "rounds per record that nobody was shown count as if they were per patient",
    ),
    one(
        37, "a-receipt-knows-every-adopted-key", "fedtune/officer/withdraw.py",
        "may_have_it = spent.dataset in datasets or spent.dataset not in known",
        "may_have_it = spent.dataset in datasets or spent.own_dataset not in known",
        T_COLUMNS + "test_a_receipt_lists_what_was_adopted_for_whoever_left_the_file",
        "a signed receipt says that no study had a patient who trained before an adoption",
    ),
    one(
        37, "who-is-nowhere-was-nowhere", "fedtune/officer/withdraw.py",
        "names or {*known, site.data.name}", "names",
        T_COLUMNS + "test_a_receipt_lists_what_a_restore_entered",
        "a signed receipt says that no study had a patient who left the files before a restore",
    ),
    one(
        37, "an-adopted-charge-has-no-first-column", "fedtune/core/ledger/account.py",
        "self.all_columns.get(spent.own_dataset, [])", "self.all_columns.get(spent.dataset, [])",
        T_COLUMNS + "test_a_correction_is_seen_by_adopted_charges_that_name_no_column",
        "a corrected column is not seen by what an earlier release adopted",
    ),
    one(
        37, "a-view-judges-by-what-was-declared", "fedtune/cli/site.py",
        "stated = book.as_stated(dataset, disjoint_datasets(loaded), columns)  # as a plan",
        "stated = book  # as a plan",
        T_COLUMNS + "test_who_takes_disjoint_from_back_is_shown_and_accepts_what_counts_then",
        "a plan can neither be signed nor its charges be accepted",
    ),
    one(
        "hospital", "an-adopted-ledgers-receipt-is-nobodys", "fedtune/core/vault/noted.py",
        "if site.site.hospital and is_for_adopted", "if False and is_for_adopted",
        T_ADOPT + "test_a_receipt_from_before_an_adoption_is_one_of_the_adopted_ledger",
        "an adopted site answers no further study of a coordinator that it knew before",
    ),
    one(
        "hospital", "an-adopted-ledger-had-every-entry", "fedtune/core/ledger/adopted.py",
        "if not known.has(head):",
        "if head.seq > max(each.seq for each in known.heads):",
        T_ADOPT + "test_a_receipt_for_what_an_adopted_ledger_lacked_is_refused",
        "charges that a site lost before its adoption are in no ledger, and nobody learns of it",
    ),
    one(
        "hospital", "an-adopted-withdrawal-comes-last", "fedtune/core/ledger/ledger.py",
        "if when.paid <= paid)", "if paid == len(earlier))",
        T_ADOPT + "test_a_new_receipt_lists_nothing_that_was_charged_after_the_withdrawal",
        "a signed receipt lists rounds of the time after the withdrawal",
    ),
    one(
        "hospital", "what-was-declared-is-left-behind", ADOPT,
        "if names := list_not_accepted(book, table.name):", "if names := list[str]():",
        T_ADOPT + "test_what_a_later_site_declared_is_accepted_before_it_is_adopted",
        "records that were tried in no budget train as private ones, and nobody accepted it",
    ),
    one(
        "hospital", "an-adopted-withdrawal-has-no-column", "fedtune/core/ledger/ledger.py",
        "_withdrawal(unit, when.columns, when.since)", "_withdrawal(unit, (), when.since)",
        T_ADOPT + "test_a_withdrawal_without_a_record_is_refused_until_its_key_is_given",
        "a corrected column brings back whoever withdrew before an adoption, without a word",
    ),
    one(
        "acceptance", "a-decision-trusts-a-restored-ledger",
        "fedtune/officer/acceptance/records.py",
        "        known_since=_known_since(ledger),\n", "",
        "tests/client/test_acceptance.py::"
        "test_a_decision_says_since_when_the_ledger_knows_who_trained",
        "a model is judged on patients who trained, and the signed decision does not say so",
    ),
    one(
        "hospital", "a-home-may-lose-an-adoption", "fedtune/core/ledger/adopted.py",
        "    if not home.accounts_for(at) or not withdrawn <= {*home.withdrawn()}:\n",
        "    if at is None:\n",
        T_ADOPT + "test_an_adopted_ledgers_receipt_is_refused_where_the_home_lost_the_adoption",
        "adopted charges and withdrawals are lost with a home's copy, and nobody notices",
    ),
    one(
        "withdrawal", "a-key-stands-in-every-column", "fedtune/officer/withdraw.py",
        "columns if is_new else found_by", "columns",
        T_ADOPT + "test_a_key_withdrawn_again_has_no_column_in_which_it_does_not_stand",
        "a key of an earlier column, withdrawn again, silences that it withdrew by that column",
    ),
    one(
        "withdrawal", "a-long-column-is-entered-as-it-is", "fedtune/officer/withdraw.py",
        "found_by |= {patient_column(table)}", 'found_by |= {table.columns.patient or ""}',
        T_ADOPT + "test_a_key_withdrawn_again_has_its_columns_name_as_the_ledger_has_it",
        "an entry takes more room than is reserved for it, and nothing compares equal to it",
    ),
    one(
        "retention", "a-purge-knows-no-adopted-note", "fedtune/officer/purge.py",
        "    ADOPTED,  # by which", "    # by which",
        T_ADOPT + "test_a_purge_knows_the_note_of_an_adopted_ledger",
        "a person is told that nobody knows the note by which old receipts are recognised",
    ),
    one(
        "withdrawal", "a-receipt-lacks-the-round-under-way", "fedtune/officer/withdraw.py",
        "if of_it and is_whole:", "if of_it:",
        T_WITHDRAW + "test_a_round_under_way_at_the_withdrawal_is_in_the_next_receipt",
        "a patient's signed receipt says for good that a study has nothing of them",
    ),
    one(
        "withdrawal", "a-receipt-lists-what-was-refused", "fedtune/officer/withdraw.py",
        "spent.released and not ledger.is_refused(spent.slot)", "spent.released",
        T_WITHDRAW + "test_a_receipt_lists_no_update_that_a_person_refused",
        "a patient's signed receipt lists an update that never left",
    ),
    one(
        "hospital", "a-home-is-deleted-with-what-it-alone-holds", ADOPT,
        "if is_part and len(hospital.memberships) == 1:", "if hospital:",
        T_ADOPT + "test_no_home_is_deleted_that_holds_what_the_site_lacks",
        "a person is told to delete charges and withdrawals that are in no other ledger",
    ),
    one(
        "hospital", "a-home-that-lacks-charges-has-all", ADOPT,
        "if book.accounts_for(old.head) and has_decisions:", "if has_decisions:",
        T_ADOPT + "test_no_home_is_deleted_that_holds_what_the_site_lacks",
        "what a site paid beside the home is taken away with its ledger",
    ),
    one(
        "hospital", "an-interrupted-adoption-takes-more-away", ADOPT,
        "if first and (state / HEAD).exists():", "if not state:",
        T_ADOPT + "test_no_home_is_deleted_that_holds_what_the_site_lacks",
        "what a site paid beside the home is taken away with its ledger",
    ),
    one(
        "hospital", "a-copy-that-went-on-is-in-the-home", ADOPT,
        "if there.accounts_for(book.head):", "if there:",
        T_ADOPT + "test_a_copy_that_went_on_is_not_said_to_be_in_the_homes_ledger",
        "a person gives up a ledger whose charges are in no other one",
    ),
    one(
        "hospital", "a-home-that-is-half-made-takes-another-site",
        "fedtune/officer/memberships.py",
        "if membership.earlier and _has_own_ledger(membership.site):",
        "if membership.earlier and not hospital:",
        T_ADOPT + "test_a_home_takes_no_other_site_before_its_first_adoption_is_complete",
        "home and first site pay from two ledgers, neither of which has all charges",
    ),
    one(
        "withdrawal", "a-receipt-lists-later-rounds", "fedtune/officer/withdraw.py",
        "if spent.seq < withdrawn and sent", "if sent",
        T_WITHDRAW + "test_a_receipt_lists_nothing_that_was_charged_after_the_withdrawal",
        "a signed receipt says that rounds after the withdrawal had the patient",
    ),
    one(
        "withdrawal", "a-receipt-is-given-anew", "fedtune/officer/withdraw.py",
        "receipt = _receipt_there(path, ledger, entry, releases)", "receipt = None",
        T_WITHDRAW + "test_a_receipt_lists_nothing_that_was_charged_after_the_withdrawal",
        "the receipt at the site is not the one that the patient has",
    ),
    one(
        "withdrawal", "a-withdrawal-forgets-its-column", "fedtune/officer/withdraw.py",
        "columns if is_new else found_by", "()",
        T_WITHDRAW + "test_who_withdrew_by_another_column_is_told_at_the_site",
        "a corrected column brings back whoever withdrew, without a word",
    ),
    one(
        "withdrawal", "an-unseen-key-is-of-the-new-column", "fedtune/officer/withdraw.py",
        "is_new = ledger.hashed(key) not in ledger.withdrawn()", "is_new = True",
        T_WITHDRAW + "test_who_withdrew_by_another_column_is_told_at_the_site",
        "a key that no record of the corrected column has counts as withdrawn there",
    ),
    one(
        "withdrawal", "a-key-ends-where-python-ends-lines", "fedtune/officer/withdraw.py",
        "io.StringIO(text, newline=None)", "text.splitlines()",
        T_WITHDRAW + "test_a_key_with_a_character_at_which_python_ends_a_line",
        "such a patient cannot be withdrawn with a list",
    ),
)  # fmt: skip
