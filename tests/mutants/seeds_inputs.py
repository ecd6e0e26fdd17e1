"""Seeded bugs in how commands read what a person gives them, and in what they say of it."""

from __future__ import annotations

from tests.mutants.mutant import one as _one

READING, STATUS = "fedtune/core/files/reading.py", "fedtune/observe/status.py"
T_READING, T_CLI = "tests/test_reading.py::", "tests/test_cli.py::"
WAITS = T_READING + "test_whatever_waits_or_never_ends_is_refused_at_once"
T_NAME = T_READING + "test_a_derived_run_has_a_name_that_opens_again"
T_SCAN = "tests/data/test_scan.py::"
PAGES, T_PAGES = "fedtune/dashboard/server.py", "tests/dashboard/test_server.py::"

MUTANTS = (
    _one(
        "inputs", "a-pipe-is-a-file", READING,
        "if stat.S_ISREG(mode):", "if not stat.S_ISDIR(mode):",
        WAITS, "a pipe keeps a command waiting, a device never ends",
    ),
    _one(
        "inputs", "a-file-has-no-bound", READING,
        "if len(data) > most:", "if len(data) > 2**62:",
        T_READING + "test_a_regular_file_is_read_whole_up_to_the_bound",
        "what is too large is taken for whole",
    ),
    _one(
        "inputs", "depth-is-not-counted", READING,
        "    return not level\n", "    return True\n",
        T_READING + "test_depth_is_counted_exactly", "a deep file ends as an internal error later",
    ),
    _one(
        "inputs", "arguments-are-not-looked-at", "fedtune/cli/exit_codes.py",
        "                    _check(name, value)\n", "                    pass\n",
        "tests/test_cli_runs.py::test_what_no_command_can_use_is_refused_before_it_runs",
        "a path that no file has ends as a fault of the system",
    ),
    _one(
        "inputs", "an-error-moves-the-terminal", "fedtune/core/errors.py",
        'c if c.isprintable() else "?" for c in text', "c for c in text",
        "tests/test_cli_runs.py::"
        "test_no_error_moves_the_terminal", "a file's name or key is obeyed by a terminal",
    ),
    _one(
        "inputs", "a-status-is-believed", STATUS,
        "checked = _STATUS(status)", "checked = status",
        "tests/observe/test_status.py::test_a_status_that_fedtune_did_not_write_is_not_shown",
        "markup and control characters of a file reach the terminal",
    ),
    _one(
        "inputs", "a-strategy-is-looked-up-later", "fedtune/core/config/load.py",
        "strategy, objective = build_strategy(study), study.objective.resolved",
        "objective = study.objective.resolved\n"
        "        from fedtune.core.strategy import STRATEGIES\n"
        "        strategy = STRATEGIES.load(\"fedavg\")()",
        T_READING + "test_an_unknown_strategy_or_objective_is_said_when_the_plan_is_read",
        "a study is planned, signed and started with a strategy that is not there",
    ),
    _one(
        "inputs", "a-copy-keeps-the-objective-it-had", "fedtune/core/config/study.py",
        'copied.__dict__.pop("resolved", None)', 'copied.__dict__.get("resolved")',
        "tests/objectives/test_options.py::"
        "test_a_studys_objective_is_resolved_once_and_is_no_value_of_the_plan",
        "a plan that was changed trains the loss of the plan that it was made from",
    ),
    _one(
        "inputs", "any-text-is-a-name", "fedtune/flower/certs.py",
        "        if not is_host(name):\n", "        if not name:\n",
        T_READING + "test_the_coordinators_names_are_names",
        "the certificate names no machine, or none can be made",
    ),
    _one(
        "inputs", "a-run-is-called-as-its-folder", "fedtune/derive/derived_run.py",
        're.sub(r"[^A-Za-z0-9._-]+", "-", out.name)', "out.name",
        T_NAME, "a derived run that nothing opens again",
    ),
    _one(
        "inputs", "a-derived-run-has-no-seed", "fedtune/derive/derived_run.py",
        'first.study.model_copy(update={"name": derived_name(out, otherwise)})',
        'first.study.model_validate({"name": derived_name(out, otherwise)})',
        T_NAME, "a merged run draws otherwise than its parents",
    ),
    _one(
        "inputs", "a-prompt-has-any-length", "fedtune/evaluation/generate.py",
        "if prompt_length + max_new_tokens > most:", "if max_new_tokens < 1:",
        "tests/fuzz/test_bad_inputs.py::"
        "test_a_prompt_that_the_base_cannot_read_is_counted_before_it_is_read",
        "positions that the base never saw, and minutes of work",
    ),
    _one(
        "inputs", "help-is-markup", "fedtune/cli/commands.py",
        'MARKUP: Final = "markdown"', 'MARKUP: Final = "rich"',
        "tests/test_cli_help.py::test_no_help_has_a_hole", "[schedule] and [rl] are lost",
    ),
    _one(
        "scan", "a-text-trains-as-it-is", "fedtune/core/data/load.py",
        "scanned = self._scan(nameless)", "scanned = [*nameless]",
        T_SCAN + "test_what_trains", "names that a site asked to take out are trained on",
    ),
    _one(
        "scan", "without-the-package-unscanned", "fedtune/core/data/scan.py",
        'if table is None or table.action == "warn":',
        'if table is None or table.action == "warn" or scan_engine.name_missing_package():',
        T_SCAN + "test_without_the_package_nothing_trains_unscanned",
        "names are trained on where an installation lacks a package",
    ),
    _one(
        "scan", "a-scan-without-an-end", "fedtune/core/data/scan.py",
        "cpu_seconds=CPU_SECONDS,", "cpu_seconds=60,",
        T_SCAN + "test_a_text_that_takes_too_long_costs_its_own_unit_alone",
        "a text made for it keeps a site busy for minutes before a charge",
    ),
    _one(
        "scan", "a-model-is-unpacked-at-each-reading", "fedtune/core/data/scan_engine.py",
        "        if _is_unpacked(archive, members, folder):\n            return folder\n", "",
        T_SCAN + "test_a_reading_writes_nothing_once_the_model_is_unpacked",
        "how much of the disk the records take decides whether anybody's train",
    ),
    _one(
        "scan", "a-model-is-unpacked-twice", "fedtune/core/data/scan_engine.py",
        "if not _is_unpacked(archive, members, folder):  # by another", "if True:  # by another",
        T_SCAN + "test_processes_that_unpack_at_once_leave_each_other_the_model",
        "the model that one process loads is removed by the other, and its round is of noise alone",
    ),
    _one(
        "scan", "a-site-joins-without-its-scan", "fedtune/officer/before_joining.py",
        "checks = (check_scan, ", "checks = (",
        T_SCAN + "test_a_site_joins_with_the_model_in_its_cache_or_not_at_all",
        "each round is charged and of noise alone, since a process without a network needs a model",
    ),
    _one(
        "scan", "as-many-scans-as-units", "fedtune/core/data/scan.py",
        "declared_size=self._declared_size,", "",
        T_SCAN + "test_children_are_as_many_as_is_public",
        "every account of the machine counts a site's units by the numbers of its processes",
    ),
    _one(
        "scan", "findings-anywhere", "fedtune/core/data/scan_findings.py",
        "0 <= start < end <= length", "True",
        T_SCAN + "test_what_a_child_answers_is_read_as_findings_in_its_text",
        "a text that takes a child over decides what this process does",
    ),
    _one(
        "scan", "context-through-the-whole-text", "fedtune/core/data/scan_context.py",
        "near = nlp_artifacts.lemmas[first : at + NEAR + 1]",
        "first, near = 0, nlp_artifacts.lemmas",
        T_SCAN + "test_context_is_looked_for_near_a_find_and_gives_what_presidio_gives",
        "one record of 50,000 characters keeps a site busy for hours before a charge",
    ),
    _one(
        "scan", "a-word-of-any-length-is-scanned", "fedtune/core/data/scan.py",
        "return sum(map(len, texts)) > MOST or any(map(_LONG_WORD.search, texts))",
        "return sum(map(len, texts)) > MOST",
        T_SCAN + "test_a_record_that_is_too_long_is_left_out_unscanned_and_alone",
        "symbols in a row take a time by the square of their number",
    ),
    _one(
        "scan", "words-outlive-their-text", "fedtune/core/data/scan_engine.py",
        'pipelines.nlp["en"].memory_zone()', "__import__('contextlib').nullcontext()",
        T_SCAN + "test_a_word_of_another_text_that_has_the_same_hash_changes_nothing",
        "a made-up word of one record moves where the identifiers of others are found",
    ),
    _one(
        "scan", "half-of-an-overlap-stays", "fedtune/core/data/scan_findings.py",
        "(spans[-1][0], max(spans[-1][1], finding.end))", "spans[-1]",
        T_SCAN + "test_overlapping_findings_go_as_a_whole",
        "of two overlapping findings the end of the second is not redacted",
    ),
    _one(
        "scan", "another-model-is-loaded", "fedtune/core/data/scan_engine.py",
        "                verify(fetched, SHA256)\n", "",
        T_SCAN + "test_another_model_is_not_loaded", "weights from whoever runs the mirror",
    ),
    _one(
        "inputs", "a-page-takes-any-token", PAGES,
        'return secrets.compare_digest(value.encode("utf-8", "replace"), self._token.encode())',
        "return bool(value)",
        T_PAGES + "test_without_the_token_there_is_401_and_nothing_else",
        "everybody on the machine reads a site's page",
    ),
    _one(
        "inputs", "a-page-answers-to-any-name", PAGES,
        'if not NAMES.fullmatch(headers.get("host", "")):', 'if not headers.get("host"):',
        T_PAGES + "test_a_name_that_was_rebound_to_this_machine_is_no_way_in",
        "a foreign page in the same browser reaches the server under its own name",
    ),
    _one(
        "inputs", "a-page-shows-a-reason-as-it-came", "fedtune/observe/rounds.py",
        'FIELDS["missing"](entry.get("missing") or {})', '(entry.get("missing") or {})',
        "tests/dashboard/test_pages.py::test_free_text_in_any_file_is_on_no_page",
        "what another machine wrote as its reason stands on the page",
    ),
)  # fmt: skip
