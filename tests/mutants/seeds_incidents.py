"""Bugs where a person froze a site's ledger, or left a consortium."""

from __future__ import annotations

from tests.mutants.mutant import one

T_FREEZE = "tests/client/test_freeze.py::"
T_EVIDENCE = "tests/client/test_incident_evidence.py::"
T_DISTRUST = "tests/client/test_distrust.py::"
T_RESTORED = "tests/client/test_restored.py::"
T_LOGGED = "tests/client/test_logged_steps.py::"
T_PRICES = "tests/dp/test_restore_prices.py::"

# fmt: off
MUTANTS = (
    one(
        "incidents", "a-freeze-is-not-looked-for-under-the-lock",
        "fedtune/core/ledger/ledger.py",
        "            self._check_not_frozen()\n            self._ask(dataset, permit)\n",
        "            self._ask(dataset, permit)\n",
        T_FREEZE + "test_a_frozen_ledger_reserves_for_nobody",
        "a round is charged and trained after a person froze the ledger",
    ),
    one(
        "incidents", "a-round-under-way-is-answered-although-frozen",
        "fedtune/core/vault/answers.py",
        "            site.home.check_not_frozen()  # again: a round lasts, and a person may have "
        "frozen it\n", "",
        T_FREEZE + "test_a_round_under_way_is_paid_and_not_answered",
        "what a person wanted to stop leaves all the same",
    ),
    one(
        "incidents", "a-restore-thaws", "fedtune/core/ledger/restore.py",
        "        elif stands.frozen and not base.is_frozen:\n", "        elif False:\n",
        T_FREEZE + "test_a_restore_that_lost_a_freeze_freezes_again",
        "a ledger put back to a copy answers again before a person lifted the freeze",
    ),
    one(
        "incidents", "a-frozen-ledger-loses-an-earlier-update", "fedtune/core/ledger/ledger.py",
        "if not (keeps_all or self._account.frozen):", "if not keeps_all:",
        T_FREEZE + "test_a_round_under_way_deletes_no_earlier_update_of_a_frozen_ledger",
        "a round that was under way deletes what left before it",
    ),
    one(
        "incidents", "a-refused-answer-is-no-evidence", "fedtune/core/ledger/ledger.py",
        "        if not (keeps or self._account.frozen):\n            self.path_of(slot)",
        "        if True:\n            self.path_of(slot)",
        T_FREEZE + "test_a_round_under_way_deletes_no_earlier_update_of_a_frozen_ledger",
        "what nobody let go is deleted while somebody looks into it",
    ),
    one(
        "incidents", "the-request-of-a-draw-is-no-evidence", "fedtune/officer/let_go.py",
        "        if not home.frozen:\n", "        if True:\n",
        T_FREEZE + "test_a_frozen_site_keeps_the_request_of_a_draw_that_a_person_decides",
        "what a coordinator asked for is deleted while somebody looks into it",
    ),
    one(
        "incidents", "an-incidents-freeze-hides-behind-the-salts", "fedtune/core/ledger/restore.py",
        'why += f"; {stands.frozen.why}"', "pass",
        T_RESTORED + "test_a_ledger_that_lost_its_salt_is_frozen_until_patients_withdrew_again",
        "whoever gives the keys again lifts an incident's freeze too",
    ),
    one(
        "incidents", "a-coordinator-ends-a-frozen-study", "fedtune/core/vault/worker.py",
        "is_kept=self.home.frozen is not None", "is_kept=False",
        T_FREEZE + "test_the_end_of_a_study_deletes_nothing_of_a_frozen_site",
        "a coordinator deletes files that may be evidence",
    ),
    one(
        "incidents", "a-damaged-ledger-is-frozen-nowhere", "fedtune/officer/freeze.py",
        "            if (site.home / KEY).exists():\n", "            if False:\n",
        T_FREEZE + "test_the_freeze_of_a_damaged_ledger_holds_once_it_is_restored",
        "the restore that follows answers again",
    ),
    one(
        "incidents", "a-lift-is-in-the-papers-first", "fedtune/officer/freeze.py",
        "    in_reserved_space(site, lambda: book.lift(login(), why))\n",
        "    acts.add(LIFT, \"--lift\")\n    book.lift(login(), why)\n",
        T_RESTORED + "test_a_lift_that_is_killed_anywhere_is_entered_before_the_papers_say_so",
        "a restore thaws a ledger that nobody lifted",
    ),
    one(
        "incidents", "a-new-salt-says-nothing", "fedtune/core/ledger/restore.py",
        "        if base.is_salt_lost:  # whoever", "        if False:  # whoever",
        T_RESTORED + "test_a_ledger_that_lost_its_salt_is_frozen_until_patients_withdrew_again",
        "a patient who withdrew is trained on again after a restore without the salt",
    ),
    one(
        "incidents", "a-freeze-tells-that-somebody-withdrew", "fedtune/core/ledger/restore.py",
        "        if base.is_salt_lost:  # whoever",
        "        if base.is_salt_lost and set(stands.withdrawn) - base.withdrawn:  # whoever",
        T_RESTORED + "test_a_ledger_that_lost_its_salt_is_frozen_until_patients_withdrew_again",
        "a coordinator that is told of the freeze learns that a patient of the site withdrew",
    ),
    one(
        "incidents", "a-restore-prices-lost-withdrawals", "fedtune/core/ledger/restore.py",
        "_bound(mark.costliest, lost.steps)",
        "_bound(mark.costliest, lost.steps + mark.head.seq)",
        T_PRICES + "test_a_restore_charges_alike_however_many_withdrew_or_arrived",
        "from the ε after a restore a coordinator counts the patients who withdrew or arrived",
    ),
    one(
        "incidents", "the-log-explains-what-it-does-not-show", "fedtune/core/ledger/restore.py",
        "            if head.seq > start.seq and head.hash in entered:\n"
        "                paid = paid.plus(entered[head.hash])\n",
        "            pass\n        for each in entered.values():\n"
        "            paid = paid.plus(each)\n",
        T_PRICES + "test_the_step_log_explains_only_what_it_shows",
        "rounds that a receipt counts are in no charge, since other rounds are in the step log",
    ),
    one(
        "incidents", "lost-rounds-end-no-study", "fedtune/core/ledger/account.py",
        "                self._end_plans(plan for plan, _ in body.get(\"plans\", ()))\n", "",
        T_LOGGED + "test_lost_rounds_of_unknown_studies_end_every_study_that_had_begun",
        "a study whose rounds a restore had to charge to nobody goes past its own limit",
    ),
    one(
        "incidents", "a-signed-plan-had-no-rounds", "fedtune/core/ledger/account.py",
        "*(plan for plan, _ in self.admitted), *named}", "*named}",
        T_LOGGED + "test_lost_rounds_of_unknown_studies_end_every_study_that_had_begun",
        "a plan that was signed before the copy, and ran after it, begins anew",
    ),
    one(
        "incidents", "a-plan-may-lack-rounds", "fedtune/core/vault/worker.py",
        "            check_none_lost(self.ledger, digest, in_home=self.site.hospital "
        "is not None)\n",
        "",
        T_LOGGED + "test_lost_rounds_of_unknown_studies_end_every_study_that_had_begun",
        "a study goes on of which the site no longer knows what it cost",
    ),
    one(
        "incidents", "a-review-forgets-lost-rounds", "fedtune/officer/review.py",
        "                check_none_lost(pays, study.digest)\n",
        "                pass\n",
        T_LOGGED + "test_lost_rounds_of_unknown_studies_end_every_study_that_had_begun",
        "a person signs a plan that the site refuses for good",
    ),
    one(
        "incidents", "an-adopted-loss-ends-every-study", "fedtune/core/ledger/account.py",
        "            self.ended |= {plan for plan, _ in body[\"plans\"]}",
        "            if body.get(\"plans\"):\n                self._end_plans([])",
        T_LOGGED + "test_an_adopted_ledgers_ended_plans_stay_ended",
        "one consortium's study ends for good, since a later site once lost its ledger",
    ),
    one(
        "incidents", "a-plan-is-admitted-without-its-steps", "fedtune/core/vault/worker.py",
        "            if plan:\n                self.check_steps(study.digest)\n", "",
        T_LOGGED + "test_a_site_states_no_number_of_steps_that_is_too_small[plan]",
        "a site promises rounds that it cannot answer",
    ),
    one(
        "incidents", "an-order-is-paid-without-its-steps", "fedtune/core/vault/worker.py",
        "        if prepared.private:\n            self.check_steps(digest)\n", "",
        T_LOGGED + "test_a_site_states_no_number_of_steps_that_is_too_small[order]",
        "each order of a study whose step log was lost costs ε for no answer",
    ),
    one(
        "incidents", "too-few-steps-are-stated", "fedtune/core/vault/worker.py",
        "        self.check_steps(digest)\n        return step_summary(",
        "        return step_summary(",
        T_LOGGED + "test_a_site_states_no_number_of_steps_that_is_too_small[round]",
        "a site signs fewer steps than it ran, and a run's ε is understated",
    ),
    one(
        "incidents", "a-query-is-paid-without-its-steps", "fedtune/core/vault/worker.py",
        "        self.check_steps(digest)\n        slot = self.slot(plan.study",
        "        slot = self.slot(plan.study",
        T_LOGGED + "test_a_query_is_answered_only_if_the_log_has_all_steps",
        "each query of a study whose step log was lost costs ε for no answer",
    ),
    one(
        "incidents", "an-interrupted-round-ends-a-study", "fedtune/core/vault/logged_steps.py",
        "if is_own and is_round and spent.released:", "if is_own and is_round:",
        T_LOGGED + "test_a_round_that_was_interrupted_before_its_steps_ends_nothing",
        "after a crash between charge and step a site takes no further part",
    ),
    one(
        "incidents", "a-plan-of-a-lost-row-is-new", "fedtune/core/ledger/restore.py",
        "            found |= _plans_in(", "            _plans_in(",
        T_LOGGED + "test_a_plan_that_a_restore_reads_of_is_no_new_one[signature]",
        "a plan of which only the damaged database has rows begins anew, with too few steps stated",
    ),
    one(
        "incidents", "a-restore-names-plans-in-vain", "fedtune/core/ledger/account.py",
        "for plan, _ in self.admitted), *named}", "for plan, _ in self.admitted)}",
        T_LOGGED + "test_a_plan_that_a_restore_reads_of_is_no_new_one[signature]",
        "a restore names the plans that lost rounds may be of, and they begin anew",
    ),
    one(
        "incidents", "an-adoption-forgets-ended-plans", "fedtune/officer/adopt.py",
        "login(), old.ended, old.charged", "login(), (), old.charged",
        T_LOGGED + "test_an_adoption_remembers_which_plans_a_restore_had_ended",
        "a plan that a site's restore had ended begins anew once a hospital adopts the site",
    ),
    one(
        "incidents", "an-ended-plan-links-memberships", "fedtune/core/vault/logged_steps.py",
        "        if in_home:\n", "        if False:\n",
        T_LOGGED + "test_a_plan_that_a_restore_ended_has_ended_for_every_membership",
        "a coordinator learns that the plan which it sends ran at another membership of the site",
    ),
    one(
        "incidents", "a-salt-is-replaced-before-the-database", "fedtune/core/ledger/restore.py",
        "    sync_folder(folder)\n    os.replace(draft, folder / DATABASE)\n",
        "    replace(folder / SALT, salt, private=True)\n"
        "    sync_folder(folder)\n    os.replace(draft, folder / DATABASE)\n",
        "tests/client/test_restored.py::"
        "test_a_restore_that_is_killed_anywhere_knows_that_the_salt_was_another",
        "whoever withdrew under the lost salt takes part, and nobody is asked for their keys",
    ),
    one(
        "incidents", "a-backup-beside-is-charged-twice", "fedtune/core/ledger/restore.py",
        "    paid = _list_entered([*base.entries, *base.entries_beside])\n    of_kind",
        "    paid = _list_entered(base.entries)\n    of_kind",
        T_LOGGED + "test_what_stands_beside_the_base_is_charged_as_it_is[folder-whole]",
        "rounds that backup and step log both name cost a site twice their ε",
    ),
    one(
        "incidents", "a-backup-beside-is-not-charged", "fedtune/core/ledger/restore.py",
        "charges = [*base.charges_beside, *lost]", "charges = lost",
        T_LOGGED + "test_what_stands_beside_the_base_is_charged_as_it_is[folder-put-back]",
        "rounds that only the backup knows are in no budget after a restore",
    ),
    one(
        "incidents", "a-receipt-is-charged-by-its-number", "fedtune/core/ledger/chain.py",
        "        return has_it or head in self.settled\n",
        "        ours = {seq for (seq,) in connection.execute('SELECT seq FROM entries')}\n"
        "        is_lost = head.seq not in ours and head.seq < max(ours)\n"
        "        return has_it or is_lost or head in self.settled\n",
        T_PRICES + "test_a_receipt_of_a_lost_branch_is_not_taken_for_a_charge_of_its_number",
        "a study of a branch that nobody charged for goes unnoticed",
    ),
    one(
        "incidents", "a-restore-knows-no-receipt-that-it-never-saw",
        "fedtune/core/ledger/restore.py",
        "    heads += [*(sent if anchor in marks else []), *base.heads_beside]\n",
        "    heads += base.heads_beside\n",
        T_PRICES + "test_the_anchor_holds_the_last_two_heads_that_each_coordinator_was_sent",
        "each coordinator stops a restored site, and the next restore charges its rounds again",
    ),
    one(
        "incidents", "the-anchor-forgets-a-head-with-the-next-entry",
        "fedtune/core/ledger/chain.py",
        "        self._write_anchor(read_named(path, self.key.public))\n",
        "        self._write_anchor(Named())\n",
        T_PRICES + "test_the_anchor_holds_the_last_two_heads_that_each_coordinator_was_sent",
        "a receipt for an entry before a withdrawal, or a charge, is not known after a restore",
    ),
    one(
        "incidents", "lost-rounds-cost-as-little-as-those-that-are-left",
        "fedtune/core/ledger/restore.py",
        "_bound(mark.costliest, lost.steps)",
        "_bound(Costliest(1.0, 0.1, 1), lost.steps)",
        T_PRICES + "test_lost_rounds_cost_what_anchor_or_receipt_says_they_cost_at_most",
        "rounds that were lost with the step log count with more noise than they had",
    ),
    one(
        "incidents", "a-receipt-beside-stops-a-site-again", "fedtune/core/ledger/restore.py",
        "*base.heads_beside]\n", "*base.heads_beside[-1:]]\n",
        T_LOGGED + "test_what_stands_beside_the_base_is_charged_as_it_is[folder-whole]",
        "an honest receipt stops a restored site, and the next restore charges its branch again",
    ),
    one(
        "incidents", "a-withdrawal-decides-what-a-restore-ends", "fedtune/core/ledger/restore.py",
        "local is not None and local.has(backup.head)",
        "local is not None and local.seq > backup.seq",
        "tests/dp/test_ledger_restore.py::"
        "test_a_withdrawal_after_the_backup_does_not_decide_what_a_restore_ends",
        "a coordinator sees which studies end, and by it whether a patient withdrew",
    ),
    one(
        "incidents", "a-restore-that-charges-lost-nothing", "fedtune/core/ledger/account.py",
        "if charges or body.get(\"members_lost\"):", "if body.get(\"members_lost\"):",
        "tests/dp/test_ledger_restore.py::test_a_restore_that_charges_says_that_entries_were_lost",
        "what was declared before is forgotten, and nobody is asked about it",
    ),
    one(
        "incidents", "a-round-under-way-at-a-backup-stayed-here", "fedtune/core/ledger/account.py",
        "paid.dataset == EVERY or paid.charge.study in self.ended", "paid.dataset == EVERY",
        T_LOGGED + "test_an_answer_under_way_at_a_backup_may_have_left",
        "a patient's receipt lacks a round whose update left the site",
    ),
    one(
        "incidents", "a-plan-ends-for-one-membership", "fedtune/core/vault/logged_steps.py",
        "not ledger.ended_plans.isdisjoint(_plans(digest))", "digest in ledger.ended_plans",
        T_LOGGED + "test_a_plan_that_a_restore_ended_has_ended_for_every_membership",
        "questions about held-out records go on in a study that has ended",
    ),
    one(
        "hospital", "a-restores-charge-stands-for-an-adoption", "fedtune/core/ledger/adopted.py",
        "or not home.has_entry(at):\n", "or not home.accounts_for(at):\n",
        "tests/client/test_adopt.py::"
        "test_a_restored_home_that_lost_an_adoption_goes_on_no_more[named]",
        "a home that lost an adoption goes on, and who withdrew at the adopted site takes part",
    ),
    one(
        "incidents", "an-ended-study-keeps-a-client-away", "fedtune/officer/step_log.py",
        "if ledger and not has_ended(ledger, digest):", "if ledger:",
        T_LOGGED + "test_a_study_that_has_ended_needs_no_step_log",
        "after a restore without its step log a client never starts again",
    ),
    one(
        "incidents", "a-restored-charge-has-not-left", "fedtune/core/ledger/account.py",
        "seq in self.done or paid.dataset == EVERY or", "seq in self.done or",
        T_LOGGED + "test_an_adopted_ledgers_ended_plans_stay_ended",
        "after an adoption a receipt lacks the rounds that a restore had entered",
    ),
    one(
        "incidents", "a-kept-table-has-the-password", "fedtune/evidence/incident.py",
        "if name == SETTINGS or path.name == CHECKED:", "if name == SETTINGS:",
        "tests/client/test_incident_evidence.py::"
        "test_the_tables_with_which_the_site_was_started_are_kept",
        "evidence that goes to others holds the password of the hospital's proxy",
    ),
    one(
        "incidents", "a-rounds-line-has-no-order", "fedtune/core/vault/worker.py",
        "self.ledger.hash_of(reserved), self.ledger.order_of(reserved)",
        "self.ledger.hash_of(reserved)",
        T_LOGGED + "test_each_line_of_the_log_names_its_charge_and_the_order_of_it",
        "a ledger that was put back to before its first charge restores it at another order",
    ),
    one(
        "incidents", "a-querys-line-has-no-order", "fedtune/core/vault/evaluation.py",
        "site.ledger.hash_of(reserved), site.ledger.order_of(reserved)",
        "site.ledger.hash_of(reserved)",
        T_LOGGED + "test_each_line_of_the_log_names_its_charge_and_the_order_of_it",
        "a ledger that was put back to before its first charge restores it at another order",
    ),
    one(
        "incidents", "a-newer-log-is-not-noticed", "fedtune/core/vault/logged_steps.py",
        "if named - ledger.charged_entries.keys():", "if False:",
        T_LOGGED + "test_a_log_that_is_newer_than_the_ledger_stops_the_site",
        "a ledger that was put back beside its step log goes on, and counts too little",
    ),
    one(
        "incidents", "an-adoption-forgets-which-entries-were-charged", "fedtune/officer/adopt.py",
        ", old.ended, old.charged_entries\n", ", old.ended\n",
        T_LOGGED + "test_a_hospital_does_not_charge_again_what_an_adopted_restore_had_charged",
        "a hospital that adopted a restored ledger stops, since its log names unknown charges",
    ),
    one(
        "incidents", "a-restored-charge-is-a-logged-round", "fedtune/core/vault/logged_steps.py",
        "is_round = spent.dataset != EVERY and", "is_round =",
        T_LOGGED + "test_an_adopted_restored_charge_needs_no_logged_steps",
        "an adopted site gets no further answer, since a restore had charged whole rounds",
    ),
    one(
        "incidents", "a-client-joins-without-its-step-log", "fedtune/officer/before_joining.py",
        "    check_step_log(site)\n", "",
        T_LOGGED + "test_a_site_whose_step_log_is_gone_says_so_before_it_joins",
        "a person learns only from a failed round that the step log is missing",
    ),
    one(
        "incidents", "a-doctor-misses-the-step-log", "fedtune/officer/doctor.py",
        "    check_step_log(site)\n", "",
        T_LOGGED + "test_the_doctor_says_which_steps_are_missing",
        "a ledger is called whole whose step log is missing",
    ),
    one(
        "incidents", "a-restore-hides-which-studies-end", "fedtune/cli/site.py",
        "            if ended := list_ended(book):\n", "            if ended := []:\n",
        T_LOGGED + "test_a_restore_says_which_studies_cannot_go_on",
        "a person accepts charges for a study that cannot go on",
    ),
    one(
        "incidents", "what-a-restore-charged-is-not-counted", "fedtune/core/ledger/chain.py",
        "        return list(body[\"charges\"])\n", "        return []\n",
        T_PRICES + "test_what_an_earlier_restore_charged_is_charged_again_if_it_is_lost",
        "a second restore forgets the rounds that the first one charged",
    ),
    one(
        "incidents", "a-branch-that-was-charged-stops-a-site-again", "fedtune/core/ledger/chain.py",
        "return bool(mark.charged) and mark.charged[0] in self.settled", "return False",
        T_PRICES + "test_older_receipts_of_a_lost_branch_are_charged_once[newest]",
        "a coordinator that kept old receipts stops a restored site with each of them",
    ),
    one(
        "incidents", "what-a-restore-covered-is-charged-again", "fedtune/core/ledger/restore.py",
        "            covered[mark.charged[0]] = mark.paid\n", "            pass\n",
        T_PRICES + "test_older_receipts_of_a_lost_branch_are_charged_once[oldest]",
        "a coordinator that kept old receipts has a site pay for a branch with each of them",
    ),
    one(
        "incidents", "a-row-answers-for-the-one-before-it", "fedtune/core/ledger/restore.py",
        "        entries = self.beside.entries if self.beside else []\n",
        "        entries = self.entries_beside\n",
        T_PRICES + "test_a_row_that_can_be_read_says_nothing_of_the_one_before_it",
        "a lost round between rows that can be read is in no total, and no receipt shows it",
    ),
    one(
        "incidents", "lines-of-one-charge-cost-as-the-last", "fedtune/core/ledger/restore.py",
        "noise_multiplier=min(first.noise_multiplier, second.noise_multiplier)",
        "noise_multiplier=second.noise_multiplier",
        T_PRICES + "test_lines_that_name_one_charge_count_at_their_costliest",
        "steps with little noise are charged as steps with more",
    ),
    one(
        "incidents", "a-line-that-names-no-charge-is-charged-again",
        "fedtune/core/ledger/restore.py",
        "_without(charge, max(0, of_kind[kind]))", "_without(charge, 0)",
        T_PRICES + "test_a_line_of_an_older_release_is_charged_if_its_round_is_not",
        "a restore charges each round again that ran before lines named their charges",
    ),
    one(
        "incidents", "two-branches-charges-have-one-hash", "fedtune/core/ledger/chain.py",
        'body["nonce"] = secrets.token_hex(8)', "pass",
        T_PRICES + "test_like_charges_of_two_branches_have_two_hashes",
        "a round that ran on two branches within one second is paid for once",
    ),
    one(
        "incidents", "the-step-log-names-no-charge", "fedtune/core/vault/worker.py",
        "begin_round(self.ledger.hash_of(reserved), ", 'begin_round("", ',
        T_LOGGED + "test_a_lost_round_that_log_and_anchor_show_is_charged_once",
        "a database that is lost costs a site twice what it spent since its backup",
    ),
    one(
        "incidents", "the-longer-chain-has-all", "fedtune/core/ledger/restore.py",
        "if local is not None and local.has(backup.head):", "if local is not None:",
        T_PRICES + "test_what_only_the_copy_has_is_charged_and_decided",
        "a folder that was put back and went on is restored without what only the copy paid",
    ),
    one(
        "incidents", "a-copy-is-charged-at-each-restore", "fedtune/core/ledger/restore.py",
        "    entered = _list_entered(base.entries_beside) | entered\n", "",
        T_PRICES + "test_what_only_the_copy_has_is_charged_and_decided",
        "each further restore from the same copy charges its rounds again",
    ),
    one(
        "incidents", "a-copys-decisions-are-lost", "fedtune/core/ledger/restore.py",
        "        rows = sorted([*rows, *_readable_rows(base.beside.path)], key=itemgetter(0))\n",
        "",
        T_PRICES + "test_what_only_the_copy_has_is_charged_and_decided",
        "whoever withdrew before the folder was put back is trained on again",
    ),
    one(
        "incidents", "a-salt-of-the-right-length-is-the-salt", "fedtune/core/ledger/restore.py",
        "is_lost = _names_salt(folder, public, salt) is not True", "is_lost = len(salt) != 32",
        T_RESTORED + "test_only_a_first_entry_shows_that_a_salt_is_the_ledgers[another-]",
        "with another site's salt a patient who withdrew is trained on again",
    ),
    one(
        "incidents", "a-copys-salt-is-the-newest", "fedtune/core/ledger/restore.py",
        "is_lost = is_another or _names_salt(folder, public, backup.salt) is False",
        "is_lost = False",
        T_RESTORED + "test_only_a_first_entry_shows_that_a_salt_is_the_ledgers[an-older-copy-salt]",
        "who withdrew under the newer salt is trained on again",
    ),
    one(
        "incidents", "a-second-restore-thaws", "fedtune/core/ledger/restore.py",
        "    if is_frozen:\n", "    if False:\n",
        T_RESTORED + "test_a_restore_that_is_killed_anywhere_has_its_freeze_in_the_papers",
        "the freeze of a restore is lost by the next one",
    ),
    one(
        "incidents", "a-restore-forgets-what-was-refused", "fedtune/core/ledger/restore.py",
        "            if (fields := slot_fields(slot)) not in base.refused:\n",
        "            if (fields := slot_fields(slot)) and False:\n",
        T_RESTORED + "test_an_answer_that_was_refused_for_good_stays_refused",
        "an answer that a person refused for good is made again",
    ),
    one(
        "incidents", "a-damaged-page-costs-all-entries", "fedtune/core/ledger/restore.py",
        "                if target.in_transaction:", "                if False:",
        "tests/client/test_incident_evidence.py::"
        "test_of_a_ledger_with_a_damaged_page_the_entries_before_it_are_kept",
        "of the ledger that somebody damaged nothing is kept",
    ),
    one(
        "incidents", "a-restore-is-installed-before-it-has-who-withdrew",
        "fedtune/core/ledger/restore.py",
        "            _restore(folder, from_, key, stands, read_noted(noted, key.public))\n",
        "            _restore(folder, from_, key, Standing({}, None), None)\n"
        "            _restore(folder, None, key, stands, None)\n",
        T_RESTORED + "test_a_restore_that_is_killed_anywhere_keeps_who_withdrew_and_the_freeze",
        "a patient who withdrew is trained on again after a restore that was killed",
    ),
    one(
        "incidents", "a-damaged-log-is-no-freeze", "fedtune/officer/freeze.py",
        "    except (FedtuneError, OSError):\n",
        "    except (FedtuneError, OSError):\n        return None\n",
        T_RESTORED + "test_a_damaged_audit_log_counts_as_frozen_before_the_ledger_opens",
        "an incident that damages the audit log too ends the freeze",
    ),
    one(
        "incidents", "an-officer-waits-for-another-memberships-file", "fedtune/core/config/load.py",
        "at or path, keys_may_differ)", "at or path)",
        "tests/client/test_freeze.py::"
        "test_what_an_officer_decides_waits_for_no_other_memberships_file",
        "a file of another consortium keeps a patient from withdrawing",
    ),
    one(
        "incidents", "a-freeze-is-logged-last", "fedtune/officer/freeze.py",
        "        try:\n            AuditLog(book.folder, book.key).add(FREEZE,",
        "        book.freeze(login(), why)\n"
        "        try:\n            AuditLog(book.folder, book.key).add(FREEZE,",
        T_RESTORED + "test_a_freeze_that_is_killed_anywhere_is_known_to_a_restore_or_is_none",
        "a freeze that was killed half-way is thawed by a restore",
    ),
    one(
        "incidents", "a-frozen-ledger-is-adopted", "fedtune/officer/closed_ledger.py",
        "        if ledger._account.frozen:\n", "        if False:\n",
        "tests/client/test_adopt.py::test_nothing_is_adopted_while_a_ledger_is_frozen",
        "evidence is taken away, and a later site's freeze with it",
    ),
    one(
        "incidents", "evidence-has-a-proxys-password", "fedtune/evidence/incident.py",
        "content = PASSWORD.sub(", "PASSWORD.sub(",
        T_EVIDENCE + "test_a_proxys_password_is_not_kept",
        "whoever is handed the folder goes through the hospital's proxy",
    ),
    one(
        "incidents", "no-evidence-of-a-damaged-log", "fedtune/evidence/incident.py",
        "    except NotGenuine as error:\n        damaged",
        "    except TypeError as error:\n        damaged",
        T_EVIDENCE + "test_what_is_damaged_is_kept_as_it_is",
        "whoever changes a line of the audit log keeps a site from keeping evidence",
    ),
    one(
        "incidents", "no-evidence-of-a-damaged-ledger", "fedtune/evidence/incident.py",
        "    except (ConfigError, LedgerError) as error:", "    except TypeError as error:",
        T_EVIDENCE + "test_what_is_damaged_is_kept_as_it_is",
        "whoever edits the ledger keeps a site from keeping evidence",
    ),
    one(
        "incidents", "what-a-damaged-ledger-still-says-is-lost", "fedtune/core/ledger/restore.py",
        "    stands = _add_readable(stands, rows, key.public, base)\n", "",
        T_RESTORED + "test_a_restore_keeps_the_decisions_that_can_still_be_read",
        "whoever withdrew is trained on again, although the ledger's rows name them",
    ),
    one(
        "incidents", "between-two-damaged-pages-nothing-is-read", "fedtune/core/ledger/restore.py",
        "    if ends and ends[0] + 1 < ends[1]:\n", "    if False:\n",
        T_RESTORED + "test_what_lies_between_two_damaged_pages_is_read",
        "whoever withdrew is trained on again, although most of the ledger can be read",
    ),
    one(
        "incidents", "an-unsigned-row-withdraws-anybody", "fedtune/core/ledger/restore.py",
        "if not verifies(public, signed_entry(hash_), signature):", "if False:",
        T_RESTORED + "test_a_restore_keeps_the_decisions_that_can_still_be_read[twin]",
        "a row that the site never wrote decides who takes part",
    ),
    one(
        "incidents", "a-refusal-deletes-a-runs-answer", "fedtune/officer/let_go.py",
        "keeps=home.frozen is not None", "keeps=False",
        T_FREEZE
        + "test_a_frozen_site_keeps_the_answers_of_declared_data_that_a_person_refuses[True]",
        "an answer of declared data is deleted while somebody looks into it",
    ),
    one(
        "incidents", "a-run-loses-an-earlier-update-of-a-frozen-site",
        "fedtune/core/vault/worker.py",
        "return self.simulated or self.home.frozen is not None", "return self.simulated",
        T_FREEZE
        + "test_a_round_of_declared_data_deletes_no_earlier_update_of_a_frozen_site[True]",
        "what was sent of declared data is deleted while somebody looks into it",
    ),
    one(
        "incidents", "a-freeze-that-no-log-has-says-nothing", "fedtune/officer/freeze.py",
        "        if open_ledger(site.home).frozen is None:\n            raise\n", "        raise\n",
        T_FREEZE
        + "test_a_freeze_and_a_lift_that_the_audit_log_lacks_hold_and_the_command_says_so",
        "a person believes that nothing is frozen, and does not know that only a lift ends it",
    ),
    one(
        "incidents", "a-full-log-keeps-a-list-from-withdrawing", "fedtune/officer/withdraw.py",
        "    except (NotGenuine, InfrastructureError) as error:\n        raise NotLogged",
        "    except NotGenuine as error:\n        raise NotLogged",
        T_FREEZE
        + "test_a_log_that_cannot_be_written_keeps_nobody_from_withdrawing_or_leaving",
        "the first of a list is left out, and nobody after",
    ),
    one(
        "incidents", "a-damaged-log-keeps-a-site-in", "fedtune/officer/leave.py",
        "            if distrust:\n                raise\n", "            raise\n",
        T_FREEZE + "test_a_damaged_log_keeps_nobody_from_leaving",
        "a site with a damaged audit log cannot leave a consortium",
    ),
    one(
        "incidents", "a-log-that-is-gone-distrusted-nobody", "fedtune/officer/leave.py",
        "    check_remembered(folder)\n", "",
        T_DISTRUST
        + "test_once_the_log_is_gone_no_consortium_is_trusted_until_a_person_says_so",
        "whoever has a distrusted consortium's keys speaks for it again, once the log is moved",
    ),
    one(
        "incidents", "any-act-settles-that-a-log-is-gone", "fedtune/officer/leave.py",
        "[act for act in acts if act in (TAKEN_AWAY, LIFTED)][-1:]", "acts[-1:]",
        T_DISTRUST
        + "test_once_the_log_is_gone_no_consortium_is_trusted_until_a_person_says_so",
        "a site that goes on after its log was moved takes a distrusted consortium's answer",
    ),
    one(
        "incidents", "a-site-is-adopted-without-its-log", "fedtune/officer/adopt.py",
        "        check_remembered(site.site.state)", "        ()",
        T_DISTRUST + "test_a_site_whose_log_is_gone_is_not_adopted",
        "a hospital trusts a consortium that one of its sites had declared distrusted",
    ),
    one(
        "incidents", "evidence-has-the-salt-for-a-moment", "fedtune/evidence/incident.py",
        "book.copy_entries(to)",
        '(book.backup(to.parent), (to.parent / "salt").unlink())',
        T_EVIDENCE + "test_what_is_kept_never_held_a_salt_a_members_hash_or_a_librarys_words",
        "a folder that is handed to others names patients to whoever can guess their keys",
    ),
    one(
        "incidents", "a-receipt-names-one-memberships-releases", "fedtune/officer/withdraw.py",
        "{name for name in ledger.datasets if ledger.holds(name, key)}",
        "{name for name in [site.data.name] if ledger.holds(name, key)}",
        "tests/client/test_withdraw.py::test_a_receipt_names_what_every_membership_released",
        "a patient is not told of a model that was trained on them",
    ),
)
