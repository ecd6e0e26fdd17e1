"""Bugs where several memberships of one hospital share a ledger."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

BUDGET, ROOM = "fedtune/core/vault/budget.py", "fedtune/core/files/room.py"
HOSPITAL, SITE = "fedtune/core/config/hospital.py", "fedtune/core/config/site.py"
T_HOSPITAL = "tests/client/test_hospital.py::"
T_ADOPT = "tests/client/test_adopt.py::"
T_AT_ONCE = "tests/client/test_memberships_at_once.py::"
T_APART = "tests/client/test_disjoint_memberships.py::"

# fmt: off
MUTANTS = (
    one(
        "hospital", "a-copy-of-its-ledger-is-adopted", "fedtune/officer/adopt.py",
        "        _check_no_copy(home, site, book)\n", "",
        T_ADOPT + "test_a_copy_of_the_homes_ledger_is_not_adopted",
        "each charge counts twice, and nothing more runs",
    ),
    one(
        "hospital", "an-adopted-ledger-loses-its-order", "fedtune/core/ledger/entries.py",
        "orders = {order for charge in first for", "orders = {order for charge in first[:1] for",
        "tests/dp/test_budget.py::"
        "test_a_ledger_that_was_adopted_is_held_at_the_order_that_it_had_fixed",
        "a hospital's first plan chooses the order when the adopted site's results are known",
    ),
    one(
        "hospital", "a-quota-is-a-damaged-ledger", "fedtune/core/ledger/chain.py",
        ' or getattr(error, "sqlite_errorcode", 0) in WITHOUT_ROOM', "",
        "tests/dp/test_ledger.py::test_a_quota_that_is_used_up_is_a_disk_without_room",
        "a quota that records' hashes use up decides between trained and failed",
    ),
    one(
        "hospital", "each-membership-reads-its-own-balance", BUDGET,
        "self._exceeds_of_a_study(ahead) or self._exceeds_ceiling(ahead)",
        "self._exceeds_of_a_study(ahead)",
        T_HOSPITAL + "test_nor_in_the_midst_of_a_study",
        "three consortia spend three times what the hospital allows",
    ),
    one(
        "hospital", "a-refusal-tells-what-another-consortium-spent", BUDGET,
        "or self._exceeds_ceiling(ahead)): raise build_exceeds_hospital()",
        "or self._exceeds_ceiling(ahead)): raise BudgetExceeded(f'{self.total(0).epsilon} of all "
        "its consortia together')",
        T_HOSPITAL + "test_what_one_consortium_spent_is_not_there_for_the_other",
        "one coordinator learns how much another study costs",
    ),
    one(
        "hospital", "a-share-is-used-up-by-others", BUDGET,
        "charges=[c for c in self.charges if c.is_paid_by(mine)]", "charges=self.charges",
        T_HOSPITAL + "test_a_share_is_a_ceiling_of_its_own",
        "one consortium starves another out of its own share",
    ),
    one(
        "hospital", "a-restored-charge-is-nobodys", BUDGET,
        "charges=[c for c in self.charges if c.is_paid_by(mine)]",
        "charges=[c for c in self.charges if c.membership in mine]",
        T_HOSPITAL + "test_a_charge_that_a_restore_entered_is_everybodys",
        "what a restore cannot ascribe counts against no share",
    ),
    one(
        "hospital", "a-charge-names-no-membership", "fedtune/core/vault/worker.py",
        "            membership=site.policy.membership,\n", "",
        T_HOSPITAL + "test_each_pays_from_the_same_ledger_and_is_told_the_total",
        "no share is ever used up",
    ),
    one(
        "ledger", "a-free-plan-counts-the-members", "fedtune/core/ledger/ledger.py",
        'stands = None if hashes else previous.get("members")', "stands = None",
        "tests/dp/test_ledger.py::"
        "test_what_costs_nothing_takes_no_time_that_tells_how_many_members_there_are",
        "a coordinator reads in the time of a refusal how much the ledger remembers",
    ),
    one(
        "hospital", "all-memberships-sign-with-one-key", "fedtune/core/ledger/ledger.py",
        "return SigningKey.at(site.site.state / KEY) if site.hospital else ledger.key",
        "return ledger.key",
        T_HOSPITAL + "test_each_signs_with_a_key_of_its_own",
        "two coordinators see that a hospital is in both consortia",
    ),
    one(
        "hospital", "one-plan-in-two-consortia-is-one-slot", "fedtune/core/vault/worker.py",
        "return slot_of(earlier, policy.membership)", "return earlier",
        T_HOSPITAL + "test_one_plan_in_two_consortia_is_trained_signed_and_paid_for_twice",
        "two coordinators get the same bytes, and see that they know the same hospital",
    ),
    one(
        "hospital", "a-signature-is-for-every-consortium", "fedtune/core/ledger/ledger.py",
        "return any((plan_digest, name) in self._account.admitted for name in memberships)",
        "return any(plan == plan_digest for plan, _ in self._account.admitted)",
        T_HOSPITAL + "test_one_plan_in_two_consortia_is_trained_signed_and_paid_for_twice",
        "a plan that a person signed for one consortium runs in another",
    ),
    one(
        "hospital", "two-memberships-share-one-dose-of-noise", BUDGET,
        "        self.check_alone()\n", "",
        T_HOSPITAL + "test_with_shared_noise_a_hospital_takes_part_in_a_plan_once",
        "one opened sum moves by 2 C: 2.53 is charged where 3.80 is true",
    ),
    one(
        "hospital", "a-restored-dose-of-noise-is-nobodys", BUDGET,
        "if any(charge.membership not in self.policy.own_memberships for charge in of_plan):",
        "if any(not charge.is_paid_by(self.policy.own_memberships) for charge in of_plan):",
        T_HOSPITAL + "test_with_shared_noise_a_hospital_takes_part_in_a_plan_once",
        "after a restore a second membership joins the sum that the first one is in",
    ),
    one(
        "hospital", "what-is-paid-while-records-are-read-is-not-asked-for",
        "fedtune/core/ledger/ledger.py",
        "                permit_unknown(self._unknown_for(dataset, charge))\n"
        "            self._ask_apart(permit_apart)\n            self._ask_all(permit_all)\n"
        "            return writer",
        "                pass\n            return writer",
        T_HOSPITAL + "test_what_is_paid_for_another_unit_meanwhile_is_seen",
        "a study per patient trains after rounds per record of another consortium",
    ),
    one(
        "hospital", "a-refusal-tells-how-many-rounds-others-had", BUDGET,
        "if len(charges) >= room.rounds and policy.hospital:", "if False:",
        T_HOSPITAL + "test_the_number_of_rounds_is_shared_without_a_figure",
        "one coordinator counts another's rounds, or the ledger outgrows its room",
    ),
    Mutant(
        "hospital", "a-token-opens-in-every-membership", "fedtune/core/ledger/files.py",
        (
            ("membership.encode() or None)).hex()", "None)).hex()"),
            ("decrypt(raw[:12], raw[12:], bound)", "decrypt(raw[:12], raw[12:], None)"),
        ),
        (T_HOSPITAL + "test_no_receipt_tells_that_two_sites_are_one_hospital",),
        "two coordinators try whether their sites are one hospital",
    ),
    one(
        "hospital", "a-site-file-grants-itself-a-share", SITE,
        "if self.policy.hospital and not self.hospital:", "if False:",
        T_HOSPITAL + "test_a_site_file_cannot_grant_itself_a_share",
        "a membership writes its own ceiling",
    ),
    one(
        "hospital", "records-elsewhere-are-a-registered-dataset", HOSPITAL,
        "if not registered.is_place_of(data):", "if False:",
        T_HOSPITAL + "test_what_the_two_files_must_agree_on",
        "the same name pays for two files of patients, and two names for one",
    ),
    one(
        "hospital", "what-the-hospital-declares-is-not-applied", HOSPITAL,
        "return data.model_copy(update=declared)", "return data",
        T_HOSPITAL + "test_what_the_hospital_declares_of_a_dataset_holds_for_every_membership",
        "who opted out at the hospital is trained on by the next consortium",
    ),
    one(
        "hospital", "one-membership-gives-up-anothers-space", ROOM,
        'f"{ROOM}-{self.membership}", of_an_answer)', 'f"{ROOM}-{OFFICER}", of_an_answer)',
        T_HOSPITAL + "test_somebody_elses_space_is_not_given_up",
        "two orders at once, or a withdrawal beside one, find half the space that each needs",
    ),
    one(
        "hospital", "a-hospital-answers-one-order-at-a-time", ROOM,
        "with locks.hold(_lock_of(self.folder, self.membership)), self._given_up():",
        'with locks.hold(_lock_of(self.folder, "")), self._given_up():',
        T_AT_ONCE + "test_a_round_waits_for_no_round_of_another_consortium",
        "a round of one consortium waits for a round of another, however long",
    ),
    one(
        "hospital", "a-file-is-written-in-another-memberships-order", ROOM,
        'paths = {folder / ORDERS, *folder.glob(f"{stem}-*{Path(ORDERS).suffix}")}',
        "paths = {folder / ORDERS}",
        T_HOSPITAL + "test_orders_of_two_memberships_are_answered_at_once",
        "one coordinator's events take the disk space that another's order needs",
    ),
    one(
        "hospital", "a-courier-may-read-the-hospitals-ledger", "fedtune/courier/process.py",
        "        yield from (site.home / DATABASE, site.home / HOSPITAL)\n",
        "        yield from ()\n",
        T_HOSPITAL + "test_the_courier_reads_nothing_of_the_home",
        "what one consortium's half on the network can read is not tried",
    ),
    one(
        "hospital", "one-consortium-is-told-the-rounds-of-another", "fedtune/core/vault/worker.py",
        "step_summary(self.log.steps(digest, self.site.policy.own_memberships))",
        "step_summary(self.log.steps(digest))",
        T_HOSPITAL + "test_what_one_consortium_is_told_holds_no_round_of_another",
        "a coordinator sees that the hospital runs its plan elsewhere too, and a false ε is signed",
    ),
    one(
        "hospital", "a-step-names-no-membership", "fedtune/core/dp/steplog.py",
        "step = replace(step, membership=self._membership)", "pass",
        T_HOSPITAL + "test_what_one_consortium_is_told_holds_no_round_of_another",
        "whose steps the hospital's log holds cannot be told apart",
    ),
    one(
        "hospital", "a-purge-takes-another-memberships-updates", "fedtune/officer/purge.py",
        "mine) if path not in others]", "mine)]",
        T_HOSPITAL + "test_a_purge_leaves_what_another_membership_may_send_again",
        "another consortium's round is trained and paid for again",
    ),
    one(
        "hospital", "steps-that-are-alike-are-joined-once", "fedtune/core/dp/steplog.py",
        "own = [line for line in there if self._named(line) == line]", "own = there",
        T_ADOPT + "test_two_sites_that_ran_one_plan_have_two_lots_of_steps",
        "a restore of the hospital's ledger charges one site's steps of two",
    ),
    one(
        "hospital", "a-refusal-for-good-is-left-behind", "fedtune/officer/adopt.py",
        "refused = [slot_of(slot, name) for slot in old.refused]", "refused = old.refused",
        T_ADOPT + "test_a_refusal_for_good_and_what_was_sent_come_along[onco]",
        "what a person refused for good is sent after all",
    ),
    one(
        "hospital", "what-was-decided-before-there-was-a-home-is-forgotten",
        "fedtune/core/vault/worker.py",
        "if may_be_earlier and self.ledger.has_answered(earlier):", "if False:",
        T_ADOPT + "test_a_refusal_for_good_and_what_was_sent_come_along[cardio]",
        "what a person refused for good is sent, and what was paid for is paid again",
    ),
    one(
        "hospital", "a-ledger-is-restored-under-a-vault", "fedtune/officer/memberships.py",
        'held.enter_context(alone(state / "ranks", "the vault of a client"))', "pass",
        T_ADOPT + "test_a_ledger_is_not_restored_while_another_membership_may_pay[ranks]",
        "what another consortium's vault pays meanwhile is in no ledger",
    ),
    one(
        "hospital", "an-adoption-overwrites-a-lower-ceiling", "fedtune/officer/adopt.py",
        'if (home / FILE).read_text(encoding="utf-8") != before_it:', "if False:",
        T_ADOPT + "test_a_change_of_the_hospitals_file_meanwhile_is_not_overwritten",
        "a ceiling that a person lowered is as high as before",
    ),
    one(
        "hospital", "two-vaults-keep-one-patient", "fedtune/core/vault/worker.py",
        "            dataset = dataset.exclude_units(elsewhere.__contains__)\n", "",
        T_APART + "test_of_two_vaults_that_read_at_once_one_keeps_a_patient_of_both",
        "a patient of two disjoint datasets pays at neither what both spend",
    ),
    one(
        "hospital", "a-key-is-entered-for-both-datasets", "fedtune/core/ledger/ledger.py",
        "sorted(hashes - set(elsewhere.values()))", "sorted(hashes)",
        T_APART + "test_of_two_vaults_that_read_at_once_one_keeps_a_patient_of_both",
        "the next reading of the first dataset leaves the patient out",
    ),
    one(
        "hospital", "a-vault-is-where-its-site-file-is", "fedtune/core/vault/process.py",
        "if site.hospital:", "if False:",
        T_HOSPITAL + "test_a_vault_is_seen_though_its_site_file_was_moved",
        "what a vault pays while the ledger is restored is in no charge",
    ),
    one(
        "hospital", "any-site-file-is-a-membership", HOSPITAL,
        "if membership.site.resolve() != site_file.resolve():", "if False:",
        T_HOSPITAL + "test_what_the_two_files_must_agree_on",
        "a copy of a site file pays beside the one that the officer's commands know",
    ),
    one(
        "hospital", "a-running-membership-leaves-the-hospitals-ceilings",
        "fedtune/core/vault/declared.py", "if current.hospital != loaded.hospital:", "if False:",
        T_HOSPITAL + "test_a_running_membership_does_not_change_whose_ceilings_hold",
        "a site file that a person edits spends past what the hospital allows",
    ),
    one(
        "hospital", "a-hospital-loosens-a-sites-delta", HOSPITAL,
        "min(own.max_delta, ceilings.max_delta)", "ceilings.max_delta",
        T_HOSPITAL + "test_a_membership_keeps_its_stricter_delta",
        "a plan is admitted at a δ that the board of the membership forbids",
    ),
    one(
        "hospital", "each-membership-composes-at-its-own-delta", SITE,
        "return self.hospital.max_delta if self.hospital else self.max_delta",
        "return self.max_delta",
        T_HOSPITAL + "test_a_membership_keeps_its_stricter_delta",
        "two memberships state two totals of one ledger, and an order is fixed for the wrong δ",
    ),
    one(
        "hospital", "each-membership-has-a-whole-study", BUDGET,
        "if policy.hospital and (self._exceeds_of_a_study(ahead) or self._exceeds_ceiling(ahead))",
        "if policy.hospital and self._exceeds_ceiling(ahead)",
        T_HOSPITAL + "test_the_limit_of_a_study_holds_for_all_memberships_together",
        "one plan in two consortia costs twice what the board allows a study",
    ),
    one(
        "hospital", "each-membership-has-a-patients-lifetime", BUDGET,
        "if self.policy.hospital and self._exceeds_lifetime(ahead):", "if False:",
        T_HOSPITAL + "test_a_patients_lifetime_in_a_plan_is_one_for_all_memberships",
        "a schedule in two consortia spends a patient's lifetime twice",
    ),
    one(
        "hospital", "a-membership-declares-its-own-dataset-alone", "fedtune/core/vault/worker.py",
        "self.ledger.declare(other, apart.get(other, ()))", "pass",
        T_APART + "test_a_correction_of_what_is_disjoint_counts_for_whoever_runs",
        "what two datasets spent is not composed, though the hospital says that it is",
    ),
    one(
        "hospital", "a-vault-repeats-what-was-disjoint-when-it-started",
        "fedtune/core/vault/declared.py", "return stated.model_copy(update=apart)", "return stated",
        T_APART + "test_a_correction_of_what_is_disjoint_counts_for_whoever_runs",
        "a running vault takes the hospital's correction back",
    ),
    one(
        "hospital", "records-in-memory-are-of-both", "fedtune/core/vault/worker.py",
        "if self.site.hospital:  # which", "if False:  # which",
        T_APART + "test_who_is_in_two_datasets_that_become_disjoint_is_in_neither",
        "a patient of two datasets trains in both, and pays at neither what both spend",
    ),
    one(
        "hospital", "each-membership-has-patients-of-its-own", HOSPITAL,
        "if data.columns.patient != registered.patient:", "if False:",
        T_HOSPITAL + "test_what_the_two_files_must_agree_on",
        "a patient pays per case at one consortium, and a withdrawal finds nobody there",
    ),
    one(
        "hospital", "one-file-is-two-datasets", HOSPITAL,
        "if len(names) > 1:", "if False:",
        T_HOSPITAL + "test_what_the_two_files_must_agree_on",
        "the same patients have two budgets, if a person declares the two disjoint",
    ),
    one(
        "hospital", "a-refusal-tells-what-another-consortium-protects", BUDGET,
        "if in_home:", "if False:",
        T_HOSPITAL + "test_what_is_paid_for_another_unit_meanwhile_is_seen",
        "a coordinator learns that another consortium's study is per record",
    ),
    one(
        "hospital", "two-coordinators-are-told-one-name", "fedtune/core/vault/budget.py",
        "{dataset if at_site else 'DATASET'}", "{dataset}",
        T_HOSPITAL + "test_what_is_paid_for_another_unit_meanwhile_is_seen",
        "a refusal names the dataset, by which two coordinators see one hospital",
    ),
    one(
        "hospital", "a-name-that-only-signed-is-free-again", "fedtune/officer/memberships.py",
        "if name in earlier_names(home):", "if False:",
        "tests/client/test_memberships_command.py::"
        "test_a_name_for_which_a_person_signed_is_not_given_again",
        "what a person signed for one consortium admits the plan of another",
    ),
    one(
        "hospital", "one-site-file-decides-for-all-memberships", "fedtune/officer/let_go.py",
        "if one.waiting.membership in own]", "if True]",
        T_HOSPITAL + "test_a_person_decides_about_one_memberships_answers",
        "the officer of one consortium lets another's answers go, or refuses them for good",
    ),
    one(
        "hospital", "a-dossier-is-approved-with-the-ledgers-key", "fedtune/cli/release.py",
        "    return signing_key(loaded, book), AuditLog", "    return book.key, AuditLog",
        "tests/client/test_membership_signatures.py::"
        "test_nothing_that_others_see_has_the_ledgers_key",
        "two coordinators see that a hospital is in both consortia",
    ),
    one(
        "hospital", "a-stale-declaration-permits-a-round", "fedtune/core/vault/worker.py",
        "if stated != declared or named != columns:", "if False:",
        T_APART + "test_a_stale_declaration_permits_no_round_of_another_vault",
        "each of two datasets pays for one round that counts against both",
    ),
    one(
        "hospital", "a-stale-declaration-is-told", "fedtune/core/vault/worker.py",
        "            if stated != declared or named != columns:\n"
        "                raise build_unprepared()",
        "            if stated != declared or named != columns:\n"
        "                from fedtune.core.vault.prepared import Unprepared\n\n"
        '                raise Unprepared("this site reads its settings anew")',
        T_APART + "test_a_stale_declaration_permits_no_round_of_another_vault",
        "a coordinator learns that the hospital is in another consortium",
    ),
    one(
        "hospital", "a-membership-reads-other-keys", HOSPITAL,
        "if table.name == other.name and ours != theirs:", "if False:",
        T_HOSPITAL + "test_every_membership_reads_a_patients_key_alike",
        "a patient who withdrew takes part in another consortium, under a key read otherwise",
    ),
)
