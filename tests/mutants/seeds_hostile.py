"""Seeded bugs in what a stranger's folder, file or connection may cost."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

FIGURES = "fedtune/evidence/figures.py"
PAGES, CONNECTIONS = "fedtune/dashboard/server.py", "fedtune/dashboard/connections.py"
T_PAGES, T_READING = "tests/dashboard/test_server.py::", "tests/test_reading.py::"
T_LOCKS, T_BACKUP = "tests/test_locks.py::", "tests/server/test_backup.py::"
T_LONG = "tests/isolation/test_long_messages.py::"
HOURS = (
    "tests/test_verify_attacks.py::"
    "test_a_log_that_would_take_the_accountant_hours_is_refused_before"
)

MUTANTS = (
    _one(
        "hostile", "a-log-is-not-compared-with-its-plan", FIGURES,
        "if why := step_summary.objection(log, agreed):\n", "if why := '':\n",
        HOURS, "verify computes ε of whatever a stranger signed",
    ),
    _one(
        "hostile", "any-number-of-kinds-of-steps", "fedtune/evidence/step_summary.py",
        'len({(event["sigma"], event["q"]) for event in log}) > KINDS', "not log",
        HOURS, "a thousand distributions to compose, each for seconds",
    ),
    _one(
        "hostile", "any-number-of-steps-is-accounted", FIGURES,
        'if sampled and sum(e["steps"] for e in log) > MOST_STEPS:', "if not log:",
        HOURS, "a plan of a stranger's own keeps verify busy",
    ),
    _one(
        "hostile", "an-absurd-epsilon-is-computed", FIGURES,
        "if sampled and least > MOST_EPSILON:", "if not log:",
        HOURS, "minutes for a figure that guarantees nothing",
    ),
    _one(
        "hostile", "a-page-waits-for-ever", PAGES,
        "asyncio.timeout(WORK_SECONDS)", "asyncio.timeout(9 * WORK_SECONDS)",
        T_PAGES + "test_a_figure_that_takes_for_ever_is_given_up_and_its_process_ends",
        "a stranger's folder keeps a processor and a page busy",
    ),
    _one(
        "hostile", "the-end-of-a-host-is-not-read", PAGES,
        'if not NAMES.fullmatch(headers.get("host", "")):',
        'if not NAMES.match(headers.get("host", "")):',
        T_PAGES + "test_a_name_that_was_rebound_to_this_machine_is_no_way_in",
        "[::1].attacker.example is taken for this machine",
    ),
    _one(
        "hostile", "the-token-sends-elsewhere", PAGES,
        'here = "/" + scope["path"].lstrip("/")', 'here = scope["path"]',
        T_PAGES + "test_the_address_without_its_token_is_on_this_server",
        "the address with the token leads to another server",
    ),
    _one(
        "hostile", "silent-connections-stay", CONNECTIONS,
        "        if len(self._silent) > SILENT:\n", "        if len(self._silent) > 9 * SILENT:\n",
        T_PAGES + "test_who_only_connects_keeps_nobody_out",
        "anybody on the machine takes every file that the page may open",
    ),
    _one(
        "hostile", "who-has-no-token-stays", PAGES,
        'LAST = {"connection": "close"}', "LAST: dict[str, str] = {}",
        T_PAGES + "test_who_has_no_token_holds_no_connection",
        "a connection is held open by who may not read",
    ),
    _one(
        "hostile", "a-key-of-any-length", "fedtune/core/files/reading.py",
        "    if any(key[1] for key in _KEY.finditer(source)):\n", "    if not source:\n",
        T_READING + "test_a_key_of_very_many_parts_costs_no_time",
        "tomllib takes a time that is quadratic in a key's parts",
    ),
    _one(
        "hostile", "a-fingerprint-may-be-cut-anywhere", "fedtune/observe/log.py",
        '[0-9A-Fa-f](?:[ :-]?[0-9A-Fa-f]){0,127}', '[0-9A-Fa-f]{1,4}([ :-]?[0-9A-Fa-f]{1,4}){0,31}',
        T_READING + "test_no_pattern_takes_a_time_that_explodes",
        "forty digits and a letter take hours to compare",
    ),
    _one(
        "hostile", "a-device-is-replaced", "fedtune/core/files/writing.py",
        "if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):", "if stat.S_ISSOCK(mode):",
        "tests/test_files.py::test_what_is_no_file_is_not_replaced",
        "an administrator who writes to /dev/null has none any more",
    ),
    _one(
        "hostile", "a-request-replaces-anything", "fedtune/flower/enrol.py",
        "        same = not out.is_symlink() and fields <= set(texts_in(out, reading.SMALL))\n",
        "        same = True\n",
        "tests/test_network_cli.py::test_neither_a_request_nor_an_answer_replaces_anything_else",
        "a mistyped --out takes the ledger's key",
    ),
    _one(
        "hostile", "two-train-into-one-run", "fedtune/runs/choice.py",
        "        with locks.hold_alone(run / LOCK, \"run\", run):\n", "        if True:\n",
        T_LOCKS + "test_two_processes_do_not_train_into_one_run",
        "two processes write one checkpoint",
    ),
    _one(
        "hostile", "two-studies-choose-one-folder", "fedtune/runs/choice.py",
        "while fresh.exists() or fresh in taken:", "while fresh.exists():",
        "tests/test_run_folder.py::test_studies_of_one_command_choose_no_folder_twice",
        "a run of one study is another's",
    ),
    _one(
        "hostile", "anothers-status-is-written-over", "fedtune/observe/status.py",
        "            if not self._holds():\n", "            if not self._holds() and False:\n",
        T_LOCKS + "test_the_status_of_a_running_process_is_its_own",
        "a command that was refused says that the running one has stopped",
    ),
    _one(
        "hostile", "a-pipe-as-a-lock-is-waited-for", "fedtune/core/files/locks.py",
        "            descriptor = reading.descriptor(path, os.O_RDONLY | os.O_NOFOLLOW)\n",
        "            descriptor = os.open(path, os.O_RDONLY)\n",
        T_LOCKS + "test_log_with_a_pipe_as_its_lock_says_so", "`fedtune log` never ends",
    ),
    _one(
        "hostile", "a-backup-without-its-run", "fedtune/server/backup.py",
        "        _check_run(run)\n", "",
        T_BACKUP + "test_a_backup_of_what_is_no_run_or_no_ca_is_none",
        "a mistyped --out is noticed when the backup is needed",
    ),
    _one(
        "hostile", "a-backup-whose-ca-nobody-can-read", "fedtune/server/backup.py",
        "    certs.ca(home)\n    return home\n", "    return home\n",
        T_BACKUP + "test_a_backup_of_what_is_no_run_or_no_ca_is_none", "a backup restores nothing",
    ),
    _one(
        "hostile", "holes-are-read", "fedtune/server/backup.py",
        "entry.sparse is not None or not _plain(entry.name):\n"
        "                    raise ValueError\n                if total > size:",
        "not _plain(entry.name):\n"
        "                    raise ValueError\n                if total < 0:",
        T_BACKUP + "test_a_file_of_holes_is_not_read", "a small backup fills the memory",
    ),
    _one(
        "hostile", "a-manifest-of-any-words", "fedtune/server/backup.py",
        'if not all(manifest[key] and TEXT.fullmatch(manifest[key]) for key in ("study", "at")):',
        'if not all(str(manifest[key]) for key in ("study", "at")):',
        T_BACKUP + "test_a_manifest_that_no_backup_has_is_refused",
        "restore lays out a folder, then ends with an error of its own",
    ),
    _one(
        "hostile", "a-setting-of-any-number-of-digits", "fedtune/core/config/overrides.py",
        "except (ValueError, RecursionError):", "except (UnicodeError, RecursionError):",
        "tests/test_set_option.py::test_what_is_no_setting_is_refused",
        "an internal error where a sentence is promised",
    ),
    _one(
        "hostile", "a-list-of-any-length-in-a-plan", "fedtune/core/config/types.py",
        "Names = Annotated[tuple[Text, ...], Field(max_length=MOST_NAMES)]",
        "Names = Annotated[tuple[Text, ...], Field()]",
        "tests/test_config.py::test_no_list_of_a_plan_is_longer_than_anybody_needs",
        "a plan of 300,000 classes keeps a site busy for minutes",
    ),
    _one(
        "hostile", "a-text-of-any-length-in-a-plan", "fedtune/core/config/types.py",
        "Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]",
        "Text = Annotated[str, Field()]",
        "tests/test_config.py::test_no_text_of_a_plan_is_longer_than_any_record",
        "a template of a gigabyte goes round every record of every site",
    ),
    _one(
        "hostile", "a-template-repeats-the-prompt", "fedtune/core/config/study.py",
        'return template.count("{text}") == 1', 'return "{text}" in template',
        "tests/test_config.py::test_a_template_holds_the_prompt_once",
        "a plan makes each note 2,000 times as long, and a site reads for hours before it charges",
    ),
    _one(
        "hostile", "a-courier-sends-what-no-vault-reads", "fedtune/core/wire/requests.py",
        "if _is_too_long(len(announced), len(arrays), sum(", "if len(announced) < 0 * sum((",
        T_LONG + "test_a_message_that_no_vault_reads_is_answered_with_a_failure",
        "a message of 250 kB of the coordinator's ends the vault, and what waits in its memory",
    ),
    _one(
        "hostile", "an-answer-too-long-ends-the-vault", "fedtune/core/vault/process.py",
        "    except RequestError as error:\n"
        '        log.warning("%s", error)\n'
        "        put(failure())",
        "    except ZeroDivisionError:\n        put(failure())",
        T_LONG + "test_an_answer_that_no_courier_reads_becomes_a_failure",
        "an update of more than 4 GiB ends the vault that charged it",
    ),
    _one(
        "hostile", "a-message-ends-a-client", "fedtune/launch/site.py",
        "0 if lasted or self._shown.are_up else", "0 if lasted else",
        "tests/isolation/test_halves.py::"
        "test_halves_that_were_up_are_started_again_however_often_a_message_ends_them",
        "four messages, each of which ends a half, end the site's client for good",
    ),
    _one(
        "hostile", "a-long-event-is-the-last-that-is-shown", "fedtune/core/wire/events.py",
        "len(content) > MOST or not self._send(content)", "not self._send(content)",
        T_LONG + "test_a_long_event_is_left_out_and_counted_and_the_next_one_is_read",
        "after a message with a long type the site's screen shows nothing of its courier",
    ),
    _one(
        "hostile", "a-refused-type-of-any-length", "fedtune/courier/executor.py",
        "kind = kind[:LONGEST]", "kind = kind[:]",
        T_LONG + "test_of_a_refused_messages_type_a_screen_gets_the_start",
        "a message whose type has two million characters is one event, longer than any is read",
    ),
    _one(
        "hostile", "a-key-of-few-records-is-a-column", "fedtune/core/data/sources/_interface.py",
        "self.objects < FEW and not is_header(common, self.keys)", "self.objects < 1",
        "tests/data/test_data_records.py::test_a_key_that_is_a_patients_is_in_no_message",
        "a patient's name stands in an error of doctor",
    ),
    _one(
        "hostile", "the-signers-word-is-vouched-for", "fedtune/evidence/dossier/check.py",
        '"its word": [name for name in outside if name not in compared],', '"its word": [],',
        "tests/dossier/test_verify_dossier.py::test_what_is_the_signers_word_alone_is_named",
        "a PDF of anybody's making reads as checked",
    ),
)  # fmt: skip
