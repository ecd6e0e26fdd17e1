"""Seeded bugs in where records come from, and in who agreed to their use."""

from __future__ import annotations

from tests.mutants.mutant import one

CONSENT, RECORDS, SITE = (
    "fedtune/core/data/consent.py",
    "fedtune/core/data/records.py",
    "fedtune/core/vault/worker.py",
)
SQL, DATABASES = "fedtune/core/data/sources/sql.py", "fedtune/core/data/sources/_databases.py"
FHIR, T_FHIR = "fedtune/core/data/sources/fhir.py", "tests/data/test_fhir_source.py::"
T_SQL = "tests/data/test_sql_source.py::"
TOKENS, T_TOKENS = "fedtune/core/data/tokenize.py", "tests/data/test_data_tokens.py::"
T_NEAR = "tests/data/test_neighbours.py::"
T_CONSENT, T_PROPERTY = "tests/data/test_consent.py::", "tests/guarantee/test_property.py::"
T_PINNED = T_PROPERTY + "test_a_case_that_broke_the_guarantee_once[opts-out-by-a-"

MUTANTS = (
    one(
        "consent", "consent-after-the-filter", RECORDS,
        "    return with_consent(rows, file) if isinstance(file, SiteData) else rows\n",
        "    if isinstance(file, SiteData):\n"
        "        kept = file.kept_values\n"
        "        rows = (r for r in rows if isinstance(r[1], str) or _is_kept(r[1], kept))\n"
        "        return with_consent(rows, file)\n"
        "    return rows\n",
        T_CONSENT + "test_a_row_that_the_filter_leaves_out_still_speaks_for_its_patient",
        "a no that stands in a row which is selected away is not heard",
    ),
    one(
        "data report", "a-file-of-two-patients-is-not-told", "fedtune/officer/shared_files.py",
        "if len({record.unit for record in named}) > 1", "if len(named) > 2",
        "tests/client/test_data_report.py::test_a_file_that_rows_of_two_patients_name_is_a_warning",
        "nobody at the site learns that a patient's image trains through another's row",
    ),
    one(
        "consent", "consent-of-a-row", CONSENT,
        "withheld = not yes or key in refused", "withheld = not yes",
        T_CONSENT + "test_one_row_that_does_not_say_yes_leaves_its_patient_out",
        "a patient who said no still trains with what was written before",
    ),
    one(
        "consent", "asked-once-a-study", SITE,
        "study.continuous or bool(data.consent)", "study.continuous",
        T_PINNED + "list]", "who opts out in mid-study trains to its end",
    ),
    one(
        "consent", "read-again-where-somebody-opted-out", RECORDS,
        "            if row is NO_CONSENT:\n",
        "            if withheld_in and row is not NO_CONSENT:\n"
        "                continue\n"
        "            if row is NO_CONSENT:\n",
        T_PINNED + "list]", "others' rows hang on whether somebody before them opted out",
    ),
    one(
        "consent", "a-list-for-everybody", "fedtune/core/files/reading.py",
        "if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):", "if path.stat().st_size < 0:",
        T_CONSENT + "test_a_list_that_others_may_read_is_refused",
        "whoever may read the list guesses who opted out",
    ),
    one(
        "consent", "the-nobody-on-the-list", CONSENT,
        "withheld = withheld or not key or has_opted_out(key)",
        "withheld = withheld or bool(key and has_opted_out(key))",
        T_CONSENT + "test_who_is_on_a_list_of_hashed_keys_is_left_out",
        "a record that may be anybody's is used where patients opted out",
    ),
    one(
        "consent", "a-no-beside-a-bad-cell", CONSENT,
        "return row.cells if isinstance(row, BadCell) else row if", "return row if",
        T_NEAR + "test_a_no_is_heard_though_another_cell_of_its_row_is_bad",
        "a patient's no is not heard where a cell beside it is bad",
    ),
    one(
        "intake", "a-link-fails-the-site", "fedtune/core/data/files.py",
        "and os.path.isfile(p)", "and p.is_file()",
        T_NEAR + "test_a_link_that_cannot_be_followed_is_one_file",
        "one patient's file fails the site",
    ),
    one(
        "intake", "a-pipe-is-waited-for", "fedtune/core/files/reading.py",
        "flags | os.O_NONBLOCK | os.O_CLOEXEC", "flags | os.O_CLOEXEC",
        T_NEAR + "test_a_pipe_that_takes_a_pictures_place_is_not_waited_for",
        "a pipe in a file's place holds the site's round for ever",
    ),
    one(
        "intake", "a-password-in-a-message", "fedtune/core/config/types.py",
        "        hide_input_in_errors=True,", "        hide_input_in_errors=False,",
        T_SQL + "test_a_url_with_a_secret_is_refused_and_not_repeated",
        "a notebook shows the password of a hospital's database",
    ),
    one(
        "consent", "a-receipt-for-anybody", "fedtune/officer/withdraw.py",
        "genuine = verifies(public, _encode_receipt(receipt), signature)",
        "genuine = bool(_encode_receipt(receipt))",
        "tests/client/test_withdraw.py::test_a_changed_receipt_is_none",
        "a receipt that somebody wrote passes for the site's",
    ),
    one(
        "consent", "a-receipt-counts-withdrawals", "fedtune/officer/withdraw.py",
        '        "unit": entry.body["unit"],\n',
        '        "unit": entry.body["unit"],\n        "entry": entry.seq,\n',
        "tests/client/test_withdraw.py::"
        "test_two_patients_learn_nothing_from_their_receipts_of_who_else_withdrew",
        "two patients who compare their receipts count the others'",
    ),
    one(
        "intake", "a-query-without-the-policys-leave", "fedtune/core/vault/policy.py",
        "    if site.free_query and not site.policy.allow_free_query:\n", "    if False:\n",
        "tests/test_intake.py::test_a_query_needs_the_policys_leave_and_review_and_report_say_so",
        "one patient decides which records of others train, and nobody was asked",
    ),
    one(
        "intake", "a-query-that-nobody-hears-of", "fedtune/core/vault/prepared.py",
        '({"free_query": True} if self.free_query else {})', "{}",
        "tests/test_free_query.py"
        "::test_a_site_with_a_query_says_so_in_one_word_and_every_output_of_the_run_does",
        "a report claims an ε that does not hold for what the query couples",
    ),
    one(
        "intake", "a-query-in-mid-study", "fedtune/core/vault/declared.py",
        "    if current.free_query and not loaded.free_query:\n", "    if False:\n",
        "tests/test_free_query.py::test_a_query_that_comes_in_mid_study_waits_for_a_restart",
        "the coordinator was told of a table, and a query selects what is held out",
    ),
    one(
        "intake", "a-view-is-a-table", SQL,
        "if not (is_table or self.view):", "if not columns:",
        T_SQL + "test_a_view_is_refused_until_the_site_says_that_it_is_one",
        "a LIMIT in a view couples patients, and site.toml shows a table",
    ),
    one(
        "intake", "a-bad-cell-rejects-the-site", DATABASES,
        "        return raw.decode()\n    except UnicodeDecodeError:\n        return UNDECODABLE\n",
        "        return raw.decode()\n    except UnicodeDecodeError:\n        raise\n",
        T_SQL + "test_cells_of_sqlite_each_have_a_type",
        "one patient's cell switches the site to noise",
    ),
    one(
        "intake", "a-visit-of-somebody-else", SQL,
        "by = dict.fromkeys((self.on, patient))", "by = dict.fromkeys((self.on,))",
        T_SQL + "test_a_row_of_another_patient_is_not_joined",
        "whose a visit is decides which notes of others train",
    ),
    one(
        "intake", "a-databases-own-equality", SQL,
        "usable = [cell.strip() for", "usable = [cell.strip().lower() for",
        T_NEAR + "test_another_patient_is_not_joined_whatever_the_database_calls_equal[sqlite]",
        "a ward of another patient's decides which notes train",
    ),
    one(
        "intake", "in-the-databases-order", SQL,
        "sorted(found, key=lambda row: _order(row[1]))", "found",
        T_SQL + "test_the_order_of_a_database_is_nobodys",
        "a row that is gone lets the others change places",
    ),
    one(
        "intake", "a-databases-own-words", DATABASES,
        "({type(error).__name__}{code})", "({error})",
        T_SQL + "test_what_is_not_there_is_said_without_a_cell_or_a_password",
        "an error quotes a record",
    ),
    one(
        "intake", "anybody-replaces-a-document", FHIR,
        '"yes" if (patient, str(line.get("id"))) in replaced else "no"',
        '"yes" if str(line.get("id")) in {n for _, n in replaced} else "no"',
        T_FHIR + "test_a_replacement_counts_within_one_patient_alone "
        + T_PROPERTY + "test_a_case_that_broke_the_guarantee_once[a-bulk-export]",
        "whether one patient is there decides which documents of another train",
    ),
    one(
        "intake", "anybodys-visit-has-a-site", FHIR,
        "known = encounters.get(key, {})",
        "known = next((s for (_, e), s in encounters.items() if e == key[1]), {})",
        T_FHIR + "test_a_visit_of_another_patient_says_nothing",
        "whose a visit is decides which documents of others train",
    ),
    one(
        "intake", "arrow-unpacks-columns-in-threads", "fedtune/core/data/sources/arrow.py",
        "pa.ipc.IpcReadOptions(use_threads=False)", "pa.ipc.IpcReadOptions(use_threads=True)",
        "tests/data/test_arrow_reading.py::"
        "test_no_thread_is_started_however_long_a_column_takes",
        "how many threads start follows from how long each column takes",
    ),
    one(
        "intake", "an-arrow-file-is-mapped", "fedtune/core/data/sources/arrow.py",
        'pa.PythonFile(data, mode="r")', "pa.memory_map(data.name)",
        "tests/data/test_arrow_reading.py::"
        "test_a_file_that_is_cut_off_while_it_is_read_is_its_own_matter",
        "a file that is cut off while it is read ends the process that holds everybody's records",
    ),
    one(
        "intake", "a-patient-multiplies-rows", SQL,
        "elif one[-1] in too_many:", "elif not one:",
        T_SQL + "test_rows_that_all_fit_each_other_are_not_multiplied",
        "a few rows of one patient take the site's memory and time before anything is charged",
    ),
    one(
        "intake", "conditions-for-each-document", FHIR,
        "if key not in self._texts:", "if key in self._found or key not in self._texts:",
        T_FHIR + "test_the_conditions_of_a_visit_are_made_one_text_once",
        "how long a site reads grows with the square of one patient's resources",
    ),
    one(
        "intake", "a-visit-of-any-length", FHIR,
        "            raise TooLong\n", "            pass\n",
        T_FHIR + "test_a_visit_of_too_many_conditions_rejects_its_own_documents_alone",
        "each of a patient's documents holds a text longer than a unit may have",
    ),
    one(
        "intake", "a-chat-is-rendered-for-each-answer", TOKENS,
        "starts = [0, *range(len(system) + BLOCK, len(turns), BLOCK)]", "starts = [0]",
        T_TOKENS + "test_the_work_for_a_chat_grows_with_its_messages_and_not_with_their_square",
        "how long a site reads grows with the square of one record's messages",
    ),
    one(
        "intake", "a-chat-is-tokenised-for-each-answer", TOKENS,
        "before, read = (before + shown)[-BEFORE:], read", "before, read = before + shown, read",
        T_TOKENS + "test_the_work_for_a_chat_grows_with_its_messages_and_not_with_their_square",
        "how long a site reads grows with the square of one record's messages",
    ),
    one(
        "intake", "a-chat-of-any-number-of-messages", TOKENS,
        "for role, content in messages[: max_length + 1]:", "for role, content in messages:",
        T_TOKENS
        + "test_of_a_chat_no_more_messages_are_rendered_than_max_length_has_tokens[truncate]",
        "one record's messages are rendered although none of them can be trained on",
    ),
)  # fmt: skip
