"""Bugs around the mechanism: what selects, dates, rejects, composes or answers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

FILES, RECORDS, TOKENS = (f"fedtune/core/data/{name}.py" for name in ("files", "records", "load"))
LEDGER, ARRIVALS = "fedtune/core/ledger/ledger.py", "fedtune/core/ledger/cohorts.py"
NETWORK, SITE, ANSWERS = (
    "fedtune/core/models/network.py",
    "fedtune/core/vault/worker.py",
    "fedtune/core/vault/answers.py",
)
T_TOKENS, T_RECORDS = "tests/data/test_data_tokens.py::", "tests/data/test_data_records.py::"
T_LEDGER, T_SITE = "tests/dp/test_ledger.py::", "tests/client/test_site.py::"
T_COLUMNS = "tests/client/test_patient_columns.py::"
T_WITHDRAW = "tests/client/test_withdraw.py::"
T_DECLARED = "tests/test_declared.py::"
T_FOLDER = T_RECORDS + "test_one_patients_file_is_nothing_to_the_others"
T_BEFORE = "tests/client/test_before_joining.py::"
T_ERRORS = "tests/dp/test_errors.py::"
T_LENGTH = (
    "tests/client/test_site_refusals.py::"
    + "test_a_length_that_the_base_cannot_read_is_refused_before_any_record_is_read"
)
T_ALONE = (
    "tests/data/test_data_units.py::test_what_one_record_makes_a_library_do_costs_that_record_alone"
)

T_UNSIGNED = T_SITE + "test_a_plan_that_nobody_signed_waits_and_a_signature_is_for_one_plan"
WHILE_READING = "tests/client/test_withdrawn_while_reading.py::"
T_ROUNDS = "tests/client/test_room_for_rounds.py::"
T_WAITING = "tests/client/test_waiting_plans.py::"
T_JOINING = (
    "tests/flower/test_membership.py::"
    "test_joining_with_the_fingerprint_signs_the_plan_in_the_answer_and_no_other"
)

MUTANTS = (
    one(
        "runs", "a-plan-names-the-readers-own-files", "fedtune/core/run_folder.py",
        "run / table.path.name", "run / table.path",
        "tests/test_run_folder.py::"
        "test_a_plan_that_was_handed_over_makes_nobody_read_a_file_outside_the_run",
        "a run that was handed over is measured on a file of whoever reads it",
    ),
    one(
        "resources", "plans-without-end-take-the-ledgers-room", "fedtune/core/vault/answers.py",
        "    if site.room.has_space(ENTRY):\n",
        "    if True:\n",
        "tests/client/test_admitted_plans.py::"
        "test_plans_that_are_admitted_take_nothing_of_the_ledgers_room",
        "how many plans are admitted before one fails tells how many records a ledger remembers",
    ),
    one(
        "orders", "a-schedules-round-is-ordered-without-end", SITE,
        "Budget(site.policy, plan, self.ledger.charges(self._dataset)).check_attempts(round_)",
        "pass",
        T_SITE + "test_a_round_of_a_study_with_a_schedule_is_not_ordered_without_end",
        "orders at no cost to anybody fill the ledger's room",
    ),
    one(
        "orders", "a-ledger-pays-for-rounds-without-end", "fedtune/core/vault/budget.py",
        "    if len(own) >= most:\n", "    if False:\n",
        T_ROUNDS + "test_a_ledger_pays_for_so_many_rounds_however_they_are_numbered",
        "a coordinator numbers rounds as it likes, and orders fill the ledger's room at no cost",
    ),
    one(
        "orders", "rounds-that-others-pay-meanwhile-do-not-count", SITE,
        "        rounds = partial(check_rounds, policy=site.policy, room=self.room)\n",
        "        rounds = None\n",
        T_ROUNDS + "test_what_was_paid_while_records_were_read_counts",
        "each membership of a hospital orders one round more than the ledger has room for",
    ),
    one(
        "orders", "an-epsilon-out-of-the-question-is-searched",
        "fedtune/core/vault/policy.py",
        "    if _least_cost(study, stated) > max(COMPUTED, site.policy.max_epsilon_per_study):\n",
        "    if False:\n",
        "tests/client/test_endless_plans.py::test_a_person_reads_why",
        "a plan of as many steps as a site allows keeps a person from reading it",
    ),
    one(
        "orders", "an-ended-study-that-never-ran-begins-a-ledger", SITE,
        "self.of_run(digest).finish(digest)", "self.begin_run(digest).ledger.spending()",
        "tests/client/test_reply_facts.py::"
        "test_a_refused_plan_of_declared_data_begins_no_ledger",
        "made-up studies that have ended fill a site's disk at no cost",
    ),
    one(
        "orders", "a-plan-is-kept-before-the-rules-are-asked", "fedtune/core/vault/answers.py",
        "all_runs, site = site, site.begin_run(study.digest)\n",
        "all_runs, site = site, site.begin_run(study.digest)\n"
        "        all_runs.keep_run(study.digest, site)\n",
        "tests/client/test_reply_facts.py::"
        "test_a_refused_plan_of_declared_data_begins_no_ledger",
        "made-up plans that are refused fill the memory of the half with the records",
    ),
    one(
        "orders", "an-ended-run-is-kept", SITE,
        "        self._of_runs.pop(digest, None)\n\n", "\n",
        "tests/client/test_reply_facts.py::"
        "test_a_refused_plan_of_declared_data_begins_no_ledger",
        "studies that were admitted and have ended fill the memory, as many as are named",
    ),
    one(
        "orders", "any-number-of-runs-is-kept", SITE,
        "            for oldest in list(self._of_runs)[: -studies.MOST]:\n"
        "                del self._of_runs[oldest]  # its coordinator sends the plan again\n",
        "",
        "tests/client/test_reply_facts.py::test_of_many_runs_of_declared_data_the_newest_are_kept",
        "runs whose files were purged stay in memory",
    ),
    one(
        "orders", "a-plan-that-nobody-can-pay-begins-a-ledger", SITE,
        "        if not self.has_ledger:  # a plan", "        if False:  # a plan",
        "tests/client/test_reply_facts.py::"
        "test_a_refused_plan_of_declared_data_begins_no_ledger",
        "plans that cost too much fill a site's disk at no cost, by made-up names",
    ),
    one(
        "orders", "a-vault-is-started-in-an-empty-mount-point", "fedtune/launch/site.py",
        "            check_not_put_back(site.home)  # it may not be mounted any more\n", "",
        "tests/client/test_known_homes.py::"
        "test_a_vault_that_is_started_again_begins_no_ledger",
        "a site whose volume is gone goes on with a ledger that knows no charge and no withdrawal",
    ),
    one(
        "orders", "an-endless-plan-keeps-a-site-from-answering", "fedtune/core/vault/policy.py",
        '    for refusal in _at_most("steps", stated.steps or 0, "max_steps", site.policy):\n'
        "        raise refusal\n",
        "",
        "tests/client/test_endless_plans.py::test_a_person_reads_why",
        "whoever mails a plan keeps a person from reading it, and a coordinator a site from "
        "answering",
    ),
    one(
        "orders", "questions-without-end-fill-the-ledgers-room", "fedtune/core/vault/evaluation.py",
        "    check_rounds([s.charge for s in site.ledger.spending()], current.policy, site.room)\n",
        "",
        "tests/test_private_evaluation.py::test_a_question_that_is_refused_reads_no_record",
        "queries are entries of the ledger like rounds",
    ),
    one(
        "orders", "a-policy-pays-for-rounds-that-have-no-room", "fedtune/core/vault/budget.py",
        "most = min(policy.max_rounds, room.rounds)", "most = policy.max_rounds",
        T_ROUNDS + "test_rounds_beyond_the_room_wait_for_the_next_start",
        "a ledger grows past its room where the policy was raised while the site ran",
    ),
    one(
        "orders", "an-order-that-is-refused-reads-the-records", SITE,
        "self.ledger.ask(self._dataset, permit, permit_other, of_newcomers=study.continuous)",
        "pass",
        T_ROUNDS + "test_what_is_refused_reads_no_record",
        "each reading may be an entry, and what is refused costs nothing",
    ),
    one(
        "orders", "a-question-that-is-refused-reads-the-records",
        "fedtune/core/vault/evaluation.py",
        "    site.ledger.ask(held_out.name, permit)\n", "",
        "tests/test_private_evaluation.py::test_a_question_that_is_refused_reads_no_record",
        "each reading may be an entry, and what is refused costs nothing",
    ),
    one(
        "orders", "an-admission-reads-the-records", SITE,
        "        self._check_source(study, network, self.site.data)\n        ran = ",
        "        self.data_in_study(study, network, self.site.data)\n        ran = ",
        T_ROUNDS + "test_what_is_refused_reads_no_record",
        "plans without end, at no cost, are entries without end",
    ),
    one(
        "orders", "a-plan-that-reads-otherwise-is-an-entry", LEDGER,
        'if declaration != {**previous, "content": declaration["content"]}:',
        "if declaration != previous:",
        T_ROUNDS + "test_the_hash_of_what_was_read_is_no_entry_of_its_own",
        "two plans in turn fill the ledger's room",
    ),
    one(
        "orders", "a-rounds-number-of-any-length", SITE,
        "LAST_ROUND if study.continuous", "10**1000 if study.continuous",
        T_ROUNDS + "test_a_rounds_number_has_space_in_an_entry",
        "one order is as long an entry as a coordinator likes",
    ),
    one(
        "resources", "an-earlier-studys-records-stay-in-memory", SITE,
        "                self._cached.clear()", "                pass",
        T_ROUNDS + "test_an_earlier_studys_records_are_let_go_before_a_plan_is_prepared",
        "where memory is at its limit, whether a study is admitted follows from an earlier one's",
    ),
    one(
        "orders", "an-order-holds-for-any-adapter", "fedtune/core/wire/seal.py",
        '    if fields["beside"] != digest_beside(arrays, table):\n', "    if False:\n",
        "tests/server/test_apps.py::test_an_order_holds_for_what_its_coordinator_sent_with_it",
        "the half on the network has rounds trained from adapters of its own",
    ),
    one(
        "resources", "studies-without-end-are-under-way", SITE,
        "            studies.check_number(self.site.site.state, study)\n", "",
        "tests/client/test_admitted_plans.py::test_so_many_studies_are_under_way_at_most",
        "each leaves a file in the ledger's room",
    ),
    one(
        "budget", "a-round-is-paid-for-without-end", SITE,
        "                budget.check_attempts(round_)\n", "",
        T_SITE + "test_a_plan_is_not_trained_from_as_many_adapters_as_a_coordinator_sends",
        "a plan that a person signed for its own ε spends up to the site's ceiling",
    ),
    one(
        "budget", "a-question-is-paid-for-without-end", "fedtune/core/vault/evaluation.py",
        "        Budget(current.policy, plan, charges).check_attempts(round_)\n", "",
        "tests/test_private_evaluation.py::"
        "test_one_question_is_not_asked_about_as_many_adapters_as_a_coordinator_sends",
        "a plan that a person signed asks held-out patients up to the site's ceiling",
    ),
    one(
        "runs", "a-note-that-came-with-a-run-counts", "fedtune/core/run_folder.py",
        'if noted.get("folder") != _identity(run):', "if False:",
        "tests/test_run_folder.py::test_a_plan_that_others_read_names_no_folder_of_this_machine",
        "a run that was handed over brings a note of which of this machine's files to read",
    ),
    one(
        "resources", "one-patients-texts-decide-what-is-remembered-of-all", SITE,
        "        members = dataset.trained\n", "        members = frozenset(dataset.keys)\n",
        "tests/client/test_memory_of_records.py::"
        "test_a_full_disk_keeps_which_records_of_whom_were_trained_on",
        "which records the cap keeps of everybody follows from how many one patient has",
    ),
    one(
        "resources", "a-plans-cap-is-a-rod-for-the-disk", "fedtune/core/data/load.py",
        "_cap_records(usable, REMEMBERED, is_kept)", "usable",
        "tests/client/test_memory_of_records.py::"
        "test_what_the_cap_goes_by_follows_from_no_space_on_the_disk",
        "more is remembered than the room holds, so that free space decides what is",
    ),
    one(
        "resources", "texts-take-what-is-remembered-with-them", SITE,
        "            if members == dataset.trained:\n", "            if True:\n",
        "tests/client/test_memory_of_records.py::"
        "test_texts_that_do_not_fit_take_nothing_else_with_them",
        "one patient's new texts decide whether anybody trains",
    ),
    one(
        "resources", "the-room-lends-nothing-for-the-journal", "fedtune/core/files/room.py",
        "OF_MEMBERS * self.declared_size + self.of_the_ledger\n",
        "OF_MEMBERS * self.declared_size\n",
        "tests/client/test_memory_of_records.py::test_a_long_ledger_remembers_on_a_full_disk",
        "how long a ledger is decides whether anybody trains",
    ),
    one(
        "resources", "a-room-of-one-length", "fedtune/core/files/room.py",
        "min(_length(self.folder / LEDGER), self.of_the_ledger)\n", "0\n",
        "tests/test_room.py::"
        "test_what_the_disk_has_space_for_does_not_follow_from_the_ledger[True]",
        "on a full disk the ledger's own growth decides what is remembered of whom",
    ),
    one(
        "resources", "an-earlier-update-is-sent-again-where-the-disk-has-room",
        "fedtune/core/ledger/ledger.py",
        "for other in set(self._list_stored(slot[0])) - self._to_keep(slot):",
        "for other in set():",
        "tests/dp/test_ledger_files.py::"
        "test_of_each_study_the_newest_update_alone_is_sent_again_whatever_the_disk_has",
        "whether an earlier round comes again with the same bytes measures the free space",
    ),
    one(
        "resources", "a-site-keeps-what-a-simulation-keeps", SITE,
        "keeps_all=self.keeps_all)", "keeps_all=True)",
        T_SITE + "test_a_later_round_ends_the_keeping_of_earlier_updates",
        "whether an earlier round comes again with the same bytes measures the free space",
    ),
    one(
        "resources", "a-site-keeps-earlier-answers", "fedtune/core/vault/evaluation.py",
        "keeps_all=site.keeps_all)", "keeps_all=True)",
        "tests/test_private_evaluation.py::"
        "test_the_same_question_again_gets_the_same_bytes_for_nothing",
        "whether an earlier answer comes again with the same bytes measures the free space",
    ),
    one(
        "resources", "a-site-keeps-earlier-words", "fedtune/core/vault/secure_round.py",
        "keeps_all=site.keeps_all)", "keeps_all=True)",
        "tests/secagg/test_attacks.py::test_words_of_an_earlier_round_are_kept_no_longer",
        "whether earlier words come again measures the free space, for nothing",
    ),
    one(
        "resources", "a-rank-does-not-leave-free-what-the-room-lends",
        "fedtune/core/vault/rank_process.py",
        "    PREFIX_STORE.leave_free(site.room.lent)\n", "",
        "tests/client/test_ranks.py::"
        "test_states_of_every_process_leave_free_what_the_room_of_the_ledger_lends",
        "how long all records are decides whether the next order is answered",
    ),
    one(
        "resources", "a-full-disk-keeps-a-patient-in", "fedtune/officer/withdraw.py",
        "        with site.room.of(OFFICER).give_up():\n            return enter()\n",
        "        raise\n",
        "tests/client/test_withdraw.py::"
        "test_a_patient_may_withdraw_where_the_disk_is_full_but_for_the_room",
        "whoever sends plans without end keeps a patient in training",
    ),
    one(
        "resources", "the-room-does-not-make-up-for-receipts", "fedtune/core/files/room.py",
        "            + min(self._blocks(RECEIPTS), self.of_receipts)\n", "",
        "tests/client/test_withdraw.py::"
        "test_a_withdrawal_takes_no_space_beside_the_ledgers_room",
        "on a full disk the next order is not answered once somebody withdrew",
    ),
    one(
        "resources", "an-order-is-answered-without-room", "fedtune/core/files/room.py",
        "                self._take(self.of_an_answer)\n                self._take(0)\n",
        "                self._take(0)\n",
        "tests/test_room.py::test_nothing_is_answered_on_a_disk_that_has_it_not",
        "what a ledger can enter follows from how long it is",
    ),
    Mutant(
        "resources", "plans-that-wait-take-the-ledgers-room", ANSWERS,
        (
            (
                "        if admission.waits:  # where the ledger's room is its own again\n"
                "            keep_plan(site.current(), study)\n",
                "",
            ),
            (
                "            note_admission(site, study, admission)\n",
                "            note_admission(site, study, admission)\n"
                "            if admission.waits:\n"
                "                keep_plan(site.current(), study)\n",
            ),
        ),
        (T_WAITING + "test_plans_that_wait_take_nothing_of_the_ledgers_room",),
        "plans that nobody signed fill the disk until one withdrawal decides what is answered",
    ),
    one(
        "resources", "a-plan-of-any-size-is-kept", ANSWERS,
        '        check_plan_length(str(plan["study"]))\n', "",
        T_WAITING + "test_a_plan_of_more_than_a_mebibyte_is_refused_and_not_kept",
        "a coordinator that nobody answers to writes gigabytes at a site",
    ),
    one(
        "admission", "a-further-plan-spends-unsigned", SITE,
        'if rule == "standing" or self.home', 'if rule != "signed" or self.home',
        T_UNSIGNED, "a second study spends a site's budget and nobody there has done a thing",
    ),
    one(
        "admission", "every-site-is-a-simulated-one", SITE,
        'if rule == "reviewed" and self.simulated:', 'if rule == "reviewed":',
        T_UNSIGNED, "who runs the study signs for every hospital",
    ),
    one(
        "admission", "a-signature-in-a-simulation-is-not-asked-for", SITE,
        'if rule == "reviewed" and self.simulated:', "if self.simulated:",
        T_SITE + "test_who_simulates_has_reviewed_the_plan",
        "an officer who signs each plan is passed by",
    ),
    one(
        "admission", "joining-again-signs", "fedtune/cli/network.py",
        "    if fingerprint is None:\n        typer.echo(\"plan   not signed",
        "    if known is None:\n        typer.echo(\"plan   not signed",
        T_JOINING, "a new answer's plan is signed though nobody compared a fingerprint",
    ),
    one(
        "admission", "joining-signs-what-the-site-refuses", "fedtune/cli/network.py",
        "    return None if seen.refusals else study\n", "    return study\n",
        T_JOINING, "a plan that the rules refuse runs as soon as they are loosened",
    ),
    one(
        21, "a-site-logs-its-own-loss", "fedtune/core/vault/own_loss.py",
        "    with suppress(OSError):\n",
        "    import logging\n"
        "    logging.getLogger('fedtune.site').warning('loss %s', losses.mean)\n"
        "    with suppress(OSError):\n",
        "tests/guarantee/test_own_loss.py::test_it_is_in_nothing_that_leaves",
        "a loss without noise lies in a log, which others read and keep",
    ),
    one(
        33, "a-full-disk-at-the-own-loss-ends-the-round", "fedtune/core/vault/own_loss.py",
        "    with suppress(OSError):\n", "    if True:\n",
        "tests/guarantee/test_own_loss.py::"
        "test_whatever_becomes_of_the_file_the_wire_is_the_same",
        "a round that trained fails for a file that nobody needs",
    ),
    one(
        31, "one-value-makes-the-arrow-file-unreadable", "fedtune/core/data/sources/_arrow.py",
        "        column.validate()\n        _check(column)\n",
        "        column.validate(full=True)\n",
        "tests/data/test_arrow_values.py::test_a_value_is_its_own_rows_matter",
        "one patient's time of 24:00, or text that is not UTF-8, takes every row out of the sum",
    ),
    one(
        31, "memory-that-runs-out-rejects-the-line-at-hand", "fedtune/core/data/sources/jsonl.py",
        "    except MemoryError:  # not the line's fault\n        raise\n", "",
        "tests/data/test_memory_while_reading.py::test_memory_that_runs_out_rejects_no_row",
        "what is held of one patient decides which rows of others are read",
    ),
    one(
        31, "memory-that-runs-out-rejects-the-record-at-hand", RECORDS,
        "(ConfigError, MemoryError)", "ConfigError",
        "tests/data/test_memory_while_reading.py::test_memory_that_runs_out_rejects_no_row",
        "what is held of one patient decides which rows of others are read",
    ),
    one(
        31, "a-patients-text-fills-the-memory", RECORDS,
        "if self._held[key] > CHARACTERS:", "if _characters(record) > CHARACTERS:",
        "tests/data/test_memory_while_reading.py::test_a_patients_text_is_read_up_to_a_bound",
        "one patient's many long notes leave no memory to read the others'",
    ),
    one(
        31, "patients-share-the-caps-memory", TOKENS,
        'return b"kept\\0" + unit_hash + content_of(record)',
        'return b"kept\\0" + content_of(record)',
        "tests/data/test_data_units.py::"
        "test_what_a_patient_keeps_follows_from_that_patients_past_alone",
        "one patient's boilerplate decides which notes of others train",
    ),
    one(
        31, "arrival-by-what-others-have", LEDGER,
        "self._account.arrivals.entry(dataset, writer.hashes(dataset), salted_keys)",
        "self._account.arrivals.entry(\n"
        "                    dataset, writer.hashes(dataset) | (set(salted_keys) if set(hashes) & "
        "writer.hashes(dataset) else set()), salted_keys\n                )",
        "tests/dp/test_arrivals.py::"
        "test_when_somebody_arrived_follows_from_their_own_key_alone",
        "a new patient with a note that another had already counts as present from the start",
    ),
    one(
        31, "cohorts-are-asked-about-under-the-lock", LEDGER,
        "                cohorts = self._account.cohorts(dataset)\n",
        "                cohorts = self._account.cohorts(dataset)\n"
        "                refused |= {c.entries: _refuses(permit, c.charges) for c in cohorts}\n",
        "tests/dp/test_arrivals.py::test_no_cohort_is_asked_about_under_the_lock",
        "another study's order fails if enough patients arrived in this one",
    ),
    one(
        31, "a-cohorts-answer-is-an-old-one", LEDGER,
        "unasked = {c.entries: c.charges for c in cohorts if c.entries not in refused}",
        "unasked = {} if refused else {c.entries: c.charges for c in cohorts}\n"
        "                for c in cohorts:\n"
        "                    refused.setdefault(c.entries, not unasked and False)",
        "tests/dp/test_arrivals.py::"
        "test_cohorts_are_asked_about_again_if_another_process_charged_meanwhile",
        "a cohort takes part in a round that its budget no longer allows",
    ),
    one(
        32, "every-file-must-have-every-column", FILES,
        "                yield Place(path.name, names.row or number), _check_row(row)\n",
        "                yield Place(path.name, names.row or number), _check_row(row)\n"
        "            own = Names(where, keys)\n"
        "            list(readers[path.suffix.lower()].rows(path, own))\n"
        "            own.require()\n",
        T_FOLDER, "one patient's file switches the site to noise",
    ),
    one(
        32, "one-broken-file-breaks-all", FILES,
        "            if strict and os.path.isfile(where):\n", "            if True:\n",
        T_FOLDER, "one patient's file that cannot be read switches the site to noise",
    ),
    one(
        32, "a-librarys-error-is-of-all-files", FILES,
        "        except Exception as error:  # whatever one file makes a library do is that "
        "file's matter\n",
        "        except (DataError, OSError) as error:\n",
        T_RECORDS + "test_a_file_that_makes_a_library_raise_is_nothing_to_the_others",
        "one patient's file fails the site",
    ),
    one(
        "paid", "an-adapter-is-refused-after-it-is-paid", SITE,
        "        prepared.network.load_trainable(adapter)  # before the charge: a refused one "
        "costs nothing\n        charge = ", "        charge = ",
        "tests/client/test_site_refusals.py::test_an_adapter_that_is_refused_costs_nothing",
        "an adapter that diverged spends a budget on nothing",
    ),
    one(
        32, "broken-csv-once-a-site-takes-part", FILES,
        "            if strict:\n                raise\n", "            raise\n",
        T_RECORDS + "test_once_it_takes_part_a_site_reads_what_it_can",
        "a file that became unreadable overnight changes what the site answers",
    ),
    one(
        33, "any-length-is-admitted", SITE,
        "        check_models(study, network)\n", "",
        T_LENGTH, "the longest record is told by an error",
    ),
    one(
        33, "a-refused-length-tells-why-it-failed", "fedtune/core/models/kept_state.py",
        'f"the base cannot read objective.max_length = {longest} tokens here",',
        'f"the base cannot read objective.max_length = {longest} tokens here {error!r}",',
        "tests/client/test_site_refusals.py::"
        "test_a_base_that_does_not_say_what_it_can_read_is_tried",
        "a refusal tells a coordinator whether a site's memory ran out",
    ),
    one(
        33, "a-self-test-tells-what-stopped-it", "fedtune/core/training/selftest.py",
        "{'stopped' if r.note else format(r.figure, '.3g')}",
        "{r.note or format(r.figure, '.3g')}",
        "tests/dp/test_selftest.py::"
        "test_what_stops_an_oracle_is_told_here_and_to_nobody_else",
        "a refusal tells a coordinator of a site's memory, disks and folders",
    ),
    one(
        33, "the-kind-of-an-error-leaves", ANSWERS,
        'return "failed", FAILED', 'return "failed", type(error).__name__',
        "tests/server/test_apps.py::test_only_a_refusals_words_leave_the_site",
        "what a library raises may follow from a record",
    ),
    one(
        33, "a-librarys-error-is-everybodys", TOKENS,
        "        except BaseException as error:  # of a library; it may quote the record\n",
        "        except ArithmeticError as error:\n", T_ALONE,
        "one record that a tokenizer chokes on switches the site to noise",
    ),
    one(
        33, "a-panic-ends-the-site", TOKENS,
        "        except BaseException as error:  # of a library; it may quote the record\n",
        "        except Exception as error:\n", T_ALONE,
        "a record by which a tokenizer's Rust code panics ends the process, at every start",
    ),
    one(
        8, "a-rank-clips-by-a-plan-of-its-own", "fedtune/core/vault/rank_process.py",
        'DpPlan(**header["plan"])',
        'DpPlan(**header["plan"] | {"noise_multiplier": header["plan"]["noise_multiplier"] / 4})',
        "tests/client/test_ranks.py::"
        "test_every_process_clips_by_the_plan_of_the_first_whatever_the_site_file_says_since",
        "its integers are on another grid: one patient weighs twice",
    ),
    one(
        34, "the-first-process-reads-with-all-threads", "fedtune/core/vault/rank_process.py",
        "            share_machine(0, self.size)\n        return self\n", "        return self\n",
        "tests/client/test_ranks.py::"
        "test_records_read_before_the_first_round_have_the_threads_of_every_process",
        "a row's last bits, which weights can amplify, follow from which process has it",
    ),
    one(
        33, "a-teachers-refusal-is-everybodys", TOKENS,
        "per_unit(self._examples_with_targets, (Example, str))(usable)\n",
        "[self._add_targets(o.scanned, o.example) for o in usable]\n",
        T_ALONE, "one record that is too long for the teacher switches the site to noise",
    ),
    one(
        33, "a-rows-error-is-the-steps", "fedtune/core/training/unit_gradients.py",
        '            log.error("a unit\'s gradient failed (%s); it takes no part", '
        "describe(error))\n            return Chunk",
        "            raise\n            return Chunk",
        T_ERRORS + "test_a_record_that_raises_costs_its_own_unit",
        "one record fails the round",
    ),
    one(
        33, "a-blocks-error-is-everybodys", "fedtune/core/training/unit_gradients.py",
        "            yield self._single_row(row, raises)\n",
        "            yield Chunk([row], [t.new_zeros(1, t.numel()) for t in self.trained])\n",
        T_ERRORS + "test_a_record_that_raises_costs_its_own_unit",
        "one record takes its neighbours in the block along",
    ),
    one(
        33, "states-that-fail-are-everybodys", "fedtune/core/models/cache.py",
        "                if not is_fault(error):\n                    raise\n"
        "                log.error(\"a block",
        "                raise\n                log.error(\"a block",
        T_ERRORS + "test_a_record_whose_states_cannot_be_computed_costs_its_own_unit",
        "a record that the frozen part cannot read fails the round",
    ),
    one(
        33, "a-line-of-pixels", "fedtune/core/data/media.py",
        "        if max(width, height) > ASPECT * min(width, height):\n", "        if False:\n",
        "tests/data/test_media.py::test_an_image_that_a_processor_would_blow_up_is_rejected",
        "an image processor makes a gigabyte of it",
    ),
    one(
        33, "every-tag-of-a-picture-is-written-again", "fedtune/core/data/decoding.py",
        "oriented = _turn_upright(image)",
        'oriented = __import__("PIL.ImageOps", fromlist=[""]).exif_transpose(image)',
        "tests/data/test_media.py::test_a_picture_is_turned_without_writing_its_tags_again",
        "one patient's file of 64 MiB takes minutes, and gigabytes",
    ),
    one(
        35, "charges-of-any-unit-add-up", "fedtune/core/ledger/entries.py",
        "return self.rules == RULES and self.unit in (unit, \"any\")",
        "return self.rules == RULES",
        T_LEDGER + "test_a_cost_that_nobody_knows_is_unknown_until_somebody_accepts_it",
        "a patient's records were charged one by one",
    ),
    one(
        35, "earlier-releases-are-believed", "fedtune/core/ledger/entries.py",
        "return self.rules == RULES and self.unit in (unit, \"any\")",
        "return self.unit in (unit, \"any\")",
        T_LEDGER + "test_a_cost_that_nobody_knows_is_unknown_until_somebody_accepts_it",
        "an ε that was not true is composed with one that is",
    ),
    one(
        35, "another-column-is-the-same-patient", "fedtune/core/ledger/entries.py",
        "return unit == \"record\" or not self.has_other_column", "return True",
        T_COLUMNS + "test_an_epsilon_per_visit_is_not_taken_for_a_patients",
        "a patient's visits were charged one by one: ε = 1.912 where 15.15 is true",
    ),
    one(
        35, "an-acceptance-holds-for-any-column", "fedtune/core/ledger/entries.py",
        "return self.upto >= spent.seq and seen == spent.patient_now",
        "return self.upto >= spent.seq",
        T_COLUMNS + "test_an_acceptance_holds_for_the_column_that_the_person_saw",
        "a person who accepted something else has accepted a correction that came later",
    ),
    one(
        35, "the-lock-knows-the-declared-column-alone", LEDGER,
        "{**self._account.patients, **own}", "self._account.patients",
        T_COLUMNS + "test_a_correction_in_a_home_holds_for_every_membership_at_once",
        "a membership that reads by the old column pays beside one that reads by the new",
    ),
    one(
        35, "a-coordinator-is-told-a-datasets-name", "fedtune/core/vault/budget.py",
        "{dataset if at_site else 'DATASET'}", "{dataset}",
        T_COLUMNS
        + "test_a_coordinator_learns_no_name_of_a_dataset_and_a_person_at_the_site_does",
        "a refusal names the site's own setting to its coordinator",
    ),
    one(
        35, "a-coordinator-is-told-a-declared-datasets-name", "fedtune/core/ledger/declared.py",
        'f"dataset {dataset!r}" if at_site else "this dataset"', 'f"dataset {dataset!r}"',
        "tests/test_declared.py::test_a_coordinator_learns_of_such_a_refusal_without_the_name",
        "a refusal names the site's own setting to its coordinator",
    ),
    one(
        35, "an-epsilon-of-another-column-is-in-a-receipt", "fedtune/core/ledger/spending.py",
        "    if not all(each.is_known_for(unit) for each in spent):\n        return None\n", "",
        T_COLUMNS + "test_a_receipt_states_no_epsilon_that_is_not_known",
        "a patient is told ε = 1.912 where 15.15 is true, signed",
    ),
    one(
        35, "a-receipt-forgets-rounds-by-another-key", "fedtune/officer/withdraw.py",
        'other_key = names and (spent.has_other_column or spent.charge.unit == "record")',
        "other_key = False",
        T_COLUMNS + "test_a_receipt_states_no_epsilon_that_is_not_known",
        "a patient whose records trained by another column is told that none did",
    ),
    one(
        35, "a-receipt-forgets-a-restored-round", "fedtune/officer/withdraw.py",
        "spent.dataset in datasets or spent.dataset not in known",
        "spent.dataset in datasets",
        T_COLUMNS + "test_a_receipt_lists_what_a_restore_entered",
        "a patient is not told of a round whose charge was lost and entered again",
    ),
    one(
        35, "a-view-shows-a-total-that-is-not-known", "fedtune/cli/ledger_view.py",
        "known=not unknown)", "known=True)",
        T_COLUMNS + "test_no_total_is_shown_as_known_that_is_not",
        "an officer reads ε = 1.912 where 15.15 is true",
    ),
    one(
        35, "a-status-shows-a-total-that-is-not-known", "fedtune/cli/status_view.py",
        "known=not unknown)", "known=True)",
        T_COLUMNS + "test_no_total_is_shown_as_known_that_is_not",
        "an officer watches ε = 1.912 where 15.15 is true",
    ),
    one(
        35, "a-restore-has-one-charge", "fedtune/core/ledger/entries.py",
        "return self.seq, self.place", "return self.seq, 0",
        T_COLUMNS + "test_a_receipt_lists_every_study_that_one_restore_entered",
        "a signed receipt lists one of three studies that had the patient's records",
    ),
    one(
        35, "a-home-states-what-it-does-not-know", "fedtune/officer/memberships.py",
        'if not spent.is_known_for("patient" if columns[name] else "record")', "if False",
        T_COLUMNS + "test_a_home_lists_no_epsilon_that_is_not_known",
        "a hospital reads an ε per visit as its patients'",
    ),
    one(
        35, "an-acceptance-of-rounds-is-one-of-declared-records", "fedtune/cli/site.py",
        "        named = accept_declared or []\n", "        named = accept_declared or shared\n",
        T_DECLARED + "test_declared_records_are_accepted_by_name_alone",
        "who accepted a renamed column also lets records train that were tried for free, unasked",
    ),
    one(
        35, "an-acceptance-covers-what-came-meanwhile", "fedtune/core/ledger/ledger.py",
        "upto = newest if upto is None else min(upto, newest)", "upto = newest",
        T_DECLARED + "test_nobody_accepts_what_comes_while_the_records_are_read",
        "a person has accepted a round that nobody had seen",
    ),
    one(
        35, "an-acceptance-is-for-any-declared-record", "fedtune/core/ledger/entries.py",
        "return self.upto >= entry and (self.declared is None or name in self.declared)",
        "return self.upto >= entry",
        "tests/test_declared.py::"
        "test_an_acceptance_of_something_else_is_none_of_declared_records",
        "who accepted a renamed column lets records train that were tried for free",
    ),
    one(
        35, "new-keys-have-paid-nothing", "fedtune/core/ledger/account.py",
        "return spent.dataset != dataset or not spent.is_known_for(\"patient\")",
        "return spent.dataset != dataset",
        T_COLUMNS + "test_a_patient_who_arrives_under_a_new_key_has_paid_what_was_paid_before",
        "in a study with a schedule everybody begins anew once the column is corrected",
    ),
    one(
        35, "records-have-paid-for-no-patient", "fedtune/core/ledger/account.py",
        "return spent.dataset != dataset or not spent.is_known_for(\"patient\")",
        "return spent.dataset != dataset or spent.has_other_column",
        T_COLUMNS + "test_rounds_per_record_count_for_patients_who_arrive",
        "the whole ceiling is free again once a site names its column of patients",
    ),
    one(
        35, "a-restore-knows-what-was-lost", "fedtune/core/ledger/entries.py",
        "if self.dataset == EVERY or not self.charge.is_known_for(unit):",
        "if not self.charge.is_known_for(unit):",
        T_COLUMNS + "test_what_a_restore_entered_is_not_known_until_a_person_accepts_it",
        "rounds charged per visit, lost and restored, count as if they were per patient",
    ),
    one(
        "hospital", "a-membership-pays-by-the-old-column-once-more", SITE,
        "if table and columns.get(table.name, own) != own:", "if False:",
        T_COLUMNS + "test_under_the_lock_no_round_is_charged_by_a_column_of_before",
        "one more round is charged for units that nobody is any more",
    ),
    one(
        35, "the-site-composes-what-it-does-not-know", SITE,
        "        check_known(data.name, study.unit, unknown, in_home=site.hospital is not None)\n",
        "",
        "tests/client/test_site_refusals.py::"
        "test_what_was_charged_for_another_unit_is_not_composed_with_a_study",
        "the ledger says that a cost is not known, and the site does not ask it",
    ),
    one(
        36, "who-is-in-both-takes-part-in-both", LEDGER,
        "return lambda key: self._salt_member(key) in hashes", "return lambda key: False",
        T_LEDGER + "test_what_counts_against_whom_follows_from_declarations_alone",
        "a patient in two disjoint datasets pays in one",
    ),
    one(
        36, "told-apart-afterwards-is-free", "fedtune/core/ledger/account.py",
        "self.apart_since[pair] = 0 if new else seq", "self.apart_since[pair] = 0",
        T_LEDGER
        + "test_what_was_spent_before_two_datasets_were_told_apart_counts_against_both",
        "a declaration takes back what was spent",
    ),
    one(
        37, "records-go-by-their-row", RECORDS,
        'key = f"{digest.hexdigest()} {self._copies[digest.digest()]}"',
        "key = str(len(self.records))",
        "tests/data/test_data_units.py::"
        "test_a_record_is_named_by_what_it_says_and_not_by_where_it_stands",
        "one record less renames the others",
    ),
    one(
        37, "records-withdraw-by-a-patients-key", TOKENS,
        '        if not (unit == "patient" and exclude_unit(key))\n',
        "        if not exclude_unit(key)\n",
        "tests/data/test_data_units.py::"
        "test_a_record_is_named_by_what_it_says_and_not_by_where_it_stands",
        "a patient who left takes a row of somebody else along",
    ),
    one(
        37, "who-withdrew-comes-back-without-a-column", SITE,
        "        check_column_stays(self.ledger, site, data.name, study.unit)\n", "",
        T_WITHDRAW + "test_no_study_reads_who_withdrew_as_somebody_unknown",
        "the column is taken out, and everybody who withdrew trains again, record by record",
    ),
    one(
        37, "who-withdrew-comes-back-under-another-name",
        "fedtune/core/ledger/patient_column.py",
        " or not (name in apart.get(dataset, ()) or dataset in apart.get(name, ()))\n", "\n",
        T_WITHDRAW
        + "test_nor_under_another_name_unless_a_person_signs_that_it_has_other_patients",
        "the records get another name, and everybody who withdrew trains again",
    ),
    one(
        37, "a-dataset-is-disjoint-from-itself", "fedtune/core/ledger/patient_column.py",
        "if name == dataset or not (", "if not (",
        T_WITHDRAW + "test_a_plan_that_waits_for_a_person_is_judged_by_what_the_files_state",
        "a line in the site's file lets everybody who withdrew train again",
    ),
    one(
        37, "a-review-counts-what-no-charge-will", "fedtune/officer/review.py",
        "    return ledger.as_stated(site.data.name, disjoint_datasets(site), "
        "patient_columns(site))\n",
        "    return ledger\n",
        T_WITHDRAW + "test_a_plan_that_waits_for_a_person_is_judged_by_what_the_files_state",
        "a plan that the vault would admit can be neither signed nor simulated",
    ),
    one(
        37, "charges-per-patient-show-no-column", "fedtune/core/ledger/account.py",
        'if spent.charge.unit == "patient" and spent.dataset in self.declared:', "if False:",
        T_WITHDRAW + "test_a_dataset_that_never_had_a_column_is_read_by_record",
        "the ledger of an earlier release is taken for one of records",
    ),
    one(
        37, "an-adopted-charge-locks-every-dataset-out", "fedtune/core/ledger/account.py",
        'if spent.charge.unit == "patient" and spent.dataset in self.declared:',
        'if spent.charge.unit == "patient":',
        T_WITHDRAW + "test_charges_from_which_nothing_can_be_disjoint_lock_no_dataset_out",
        "no study on records runs any more, and no person can change that",
    ),
    one(
        37, "a-restore-forgets-the-column", "fedtune/core/ledger/account.py",
        '            self._remember_columns(body.get("columns", {}))\n', "",
        T_WITHDRAW + "test_a_restore_keeps_the_column_with_whoever_withdrew_by_it",
        "a restored withdrawal is known by a key that nobody asks for",
    ),
    one(
        37, "a-study-on-records-shows-another-coordinators-plan",
        "fedtune/core/ledger/patient_column.py",
        "        if column:\n            had.setdefault(name, [column])", "        pass",
        T_WITHDRAW + "test_in_a_home_by_its_settings_and_not_by_what_another_coordinator_sent",
        "a coordinator sees when another consortium's first plan came",
    ),
    one(
        36, "a-withdrawal-reads-the-files-anew", "fedtune/core/vault/worker.py",
        "if anew or cached_view != view or cached is None:",
        "if anew or cached is None or without_withdrawn(cached, self.home) is not cached:",
        "tests/client/test_site.py::test_a_withdrawal_lets_nobody_elses_new_rows_in",
        "rows that came meanwhile tell that somebody withdrew",
    ),
    one(
        "withdrawal", "who-withdraws-while-files-are-read-trains", SITE,
        "        data = self.who_remain(self.site.data, data)\n", "",
        WHILE_READING + "test_a_round_is_without_who_withdrew_before_its_charge",
        "a receipt says that no later round reads a patient's records, and the next one does",
    ),
    one(
        "withdrawal", "who-withdraws-while-files-are-read-is-asked-about",
        "fedtune/core/vault/evaluation.py",
        "    data = site.who_remain(held_out, data)\n", "",
        WHILE_READING + "test_so_it_is_in_a_query",
        "a receipt says that no later round reads a patient's records, and the next query does",
    ),
    one(
        "withdrawal", "a-withdrawal-fails-a-round", SITE,
        "return self._or_nobody(read.network, data, remaining)", "return remaining()",
        WHILE_READING + "test_if_nobody_can_be_left_out_the_answer_is_noise_alone",
        "how many records a site has decides whether a charged round is answered",
    ),
    one(
        "restart", "a-restart-is-a-first-start", "fedtune/officer/before_joining.py",
        "if not (names := studies.under_way(site.site.state)):",
        "if (names := studies.under_way(site.site.state)) is not None:",
        T_BEFORE + "test_in_mid_study_no_record_decides_whether_a_site_comes_back",
        "after a reboot a site is there, or not, by one new row",
    ),
    one(
        "restart", "nobody-notes-a-study", "fedtune/core/vault/worker.py",
        "        studies.begin(self.site.site.state, study)\n", "",
        T_BEFORE + "test_in_mid_study_no_record_decides_whether_a_site_comes_back",
        "no restart knows of the study that it is in",
    ),
    one(
        "restart", "a-study-never-ends", "fedtune/core/vault/worker.py",
        "        studies.end(self.site.site.state, digest, is_kept=self.home.frozen is not None)\n",
        "",
        T_BEFORE + "test_a_study_is_under_way_until_its_coordinator_says_that_it_ended",
        "no check of the records stops a site any more",
    ),
    one(
        "restart", "anybody-ends-a-study", "fedtune/core/vault/answers.py",
        "            check_end(plan, study.digest, coordinator)\n", "",
        T_BEFORE + "test_nobody_but_its_coordinator_ends_a_study",
        "the half on the network has draws that wait made anew and paid for again",
    ),
    one(
        "restart", "the-end-of-any-study", "fedtune/core/wire/seal.py",
        'return b"fedtune end\\0" + digest.encode()', 'return b"fedtune end\\0"',
        T_BEFORE + "test_nobody_but_its_coordinator_ends_a_study",
        "the end of an earlier study, said once more, ends this one",
    ),
    one(
        "restart", "no-site-hears-the-end", "fedtune/server/rounds.py",
        "        if self.rounds:\n            tell_finished(self.roster, self.settings.key)\n", "",
        "tests/server/test_resume.py::"
        "test_each_site_hears_once_that_the_study_has_ended_and_not_before",
        "each site keeps the study as one that is under way",
    ),
    one(
        "restart", "what-people-typed-is-a-record", "fedtune/officer/before_joining.py",
        "    check_sheet(site)\n    checks = (check_scan,",
        "    checks = (check_sheet, check_scan,",
        T_BEFORE + "test_what_people_typed_is_checked_in_mid_study_too",
        "a sheet that nobody attested to is taken for one",
    ),
)  # fmt: skip
