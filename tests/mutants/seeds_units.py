"""Bugs of what turns a unit's rows into what it trains on: one unit reaches another."""

from __future__ import annotations

from tests.mutants.mutant import one

CHILDREN, FORKS = "fedtune/core/data/children.py", "fedtune/core/data/child_process.py"
PER_UNIT, RECORDS, TYPED = (
    "fedtune/core/data/per_unit.py",
    "fedtune/core/data/records.py",
    "fedtune/core/data/typed_rows.py",
)
CALLS = "fedtune/core/system_calls.py"
ISOLATION = "fedtune/core/isolation.py"
T_CONVERSION = "tests/data/test_conversion.py::"
T_CARRIED = T_CONVERSION + "test_nothing_is_carried_from_one_unit_to_another"
T_SHOWS = "tests/data/test_what_a_child_shows.py::"
T_HARM = T_CONVERSION + "test_harm_is_the_units_own"
T_ROWS = T_CONVERSION + "test_rows_go_and_come_as_plain_types"
T_OWN = T_CONVERSION + "test_whatever_goes_wrong_in_our_own_is_the_units_own"

MUTANTS = (
    one(
        "units", "a-conversion-in-the-process-that-forks", FORKS,
        "    gc.collect()\n", "    work(b'')\n    gc.collect()\n",
        T_CARRIED + "[in_a_shared_page]",
        "what a plug-in sets up when it is imported is shared by all children",
    ),
    one(
        "units", "each-turn-leaves-something-behind", FORKS,
        "        if not any(statuses):",
        "        if not any(ctypes.PyDLL(None).syscall and status for status in statuses):",
        T_CONVERSION + "test_no_child_counts_those_before_it[in_the_classes_of_ctypes]",
        "a child counts the units before it by what they left in the process that forks",
    ),
    one(
        "units", "a-number-lives-until-the-next-is-made", FORKS,
        "itertools.starmap(os.waitpid, waits)",
        "map(os.waitpid, iter(fork, 0), itertools.repeat(0))",
        T_CONVERSION + "test_no_child_counts_those_before_it[in_the_places_of_handles]",
        "a child sees from where an int lies whether an even number of units came before it",
    ),
    one(
        "units", "a-child-that-may-ask-for-everything", FORKS,
        'if "seccomp" not in isolation.only_computing().means:', "if False:",
        T_CARRIED + "[in_a_file]", "a file of one unit's is read by another's conversion",
    ),
    one(
        "units", "a-child-that-has-a-clock-works", ISOLATION,
        "    if not readable.isdisjoint(stopped.missing):\n", "    if False:\n",
        T_SHOWS + "test_a_child_that_can_read_the_time_does_nothing",
        "one patient's rows say when they were converted, and so how many came before",
    ),
    one(
        "units", "libraries-come-into-memory-as-they-are-used", FORKS,
        "        isolation.keep_files_in_memory()\n", "        pass\n",
        T_SHOWS + "test_what_a_child_uses_of_a_library_is_in_memory_before",
        "another account sees in which format a patient's image is kept",
    ),
    one(
        "units", "a-child-asks-when-its-pipe-was-made", CALLS,
        'COMPUTING: dict[str, Numbers] = {\n',
        'COMPUTING: dict[str, Numbers] = {\n    "fstat": (5, 80),\n',
        T_CARRIED + "[in_the_pipe_that_it_is_given]",
        "a pipe has a time and a number that is counted up: how long the earlier units took",
    ),
    one(
        "units", "as-many-children-as-units", CHILDREN,
        "            self._run_idle_children()\n", "            pass\n",
        T_CONVERSION + "test_how_many_children_there_are_is_a_public_number",
        "every account of the machine counts a site's units by the numbers of its processes",
    ),
    one(
        "units", "a-child-waits-until-a-time", CALLS,
        "_if_argument(SECOND, WAKES, given=ZERO)",
        "_if_argument(SECOND, (*WAKES, 128, 393))",
        "tests/data/test_conversion.py::"
        "test_a_child_waits_for_no_time_and_marks_no_memory_as_broken",
        "a clock that decides: whether a time has come is seen in whether the unit is empty",
    ),
    one(
        "units", "a-child-knows-its-number", CALLS,
        "(GIVE, 0, 0, ZERO)", "(GIVE, 0, 0, ALLOW)",
        T_CARRIED + "[in_a_processs_number]",
        "a conversion counts the units before it by the number of its process",
    ),
    one(
        "units", "a-child-reads-the-time-in-its-memory", ISOLATION,
        "    stopped = _stop_clocks()\n", "    stopped = Confinement()\n",
        T_CARRIED + "[in_the_time]", "how long other units took decides what comes of this one",
    ),
    one(
        "units", "a-clock-that-cannot-be-found-is-none", ISOLATION,
        "    except OSError:  # nobody can say where these pages are\n"
        "        missing.append(CLOCK_IN_MEMORY)\n",
        "    except OSError:\n        pass\n",
        T_SHOWS + "test_a_child_that_can_read_the_time_does_nothing",
        "a child that still has a clock is given records",
    ),
    one(
        "units", "a-child-wakes-other-processes", CALLS,
        "_if_argument(SECOND, WAKES, given=ZERO)", "_if_argument(SECOND, WAKES)",
        T_SHOWS + "test_a_child_wakes_no_process_at_a_word_of_a_librarys_file",
        "a converter passes its unit's rows to the courier by words of the C library",
    ),
    one(
        "units", "a-child-shows-what-it-blocks", CALLS,
        '**{"mremap": (25, 216), "restart_syscall": (219, 128)},',
        '**{"mremap": (25, 216), "rt_sigprocmask": (14, 135)},',
        T_SHOWS + "test_a_child_shows_nobody_a_row",
        "a converter shows bits of a row in the status that every account can read",
    ),
    one(
        "units", "a-command-line-that-a-child-writes", FORKS,
        "    isolation.hide_command_line()\n", "",
        T_SHOWS + "test_a_child_shows_nobody_a_row",
        "a converter shows a row in the command line that every account can read",
    ),
    one(
        "units", "options-in-a-command-line", CHILDREN,
        "boot.command(self._program),",
        "boot.command(self._program, json.dumps(self._settings)),",
        T_SHOWS + "test_settings_are_in_no_command_line",
        "every account reads the key by which a converter makes pseudonyms",
    ),
    one(
        "units", "a-child-writes-to-dev-null", FORKS,
        "    os.closerange(0, first)\n", "    os.closerange(3, first)\n",
        T_SHOWS + "test_a_child_cannot_write_to_dev_null",
        "every account sees that one unit's image made a library warn",
    ),
    one(
        "units", "a-child-crashes-aloud", FORKS,
        "    for number in CRASHES:\n", "    for number in ():\n",
        T_SHOWS + "test_how_a_child_ends_tells_nothing",
        "an address that a converter chooses is written into the kernel's log",
    ),
    one(
        "units", "a-childs-status-tells-of-its-unit", CALLS,
        '"exit_group": ((231, 94), FIRST, (0, *CRASHES)),',
        '"exit_group": ((231, 94), FIRST, (0, 77, *CRASHES)),',
        T_SHOWS + "test_how_a_child_ends_tells_nothing",
        "a converter chooses the status with which its child ends, which Linux tells every account",
    ),
    one(
        "units", "answers-without-an-end", CHILDREN,
        "time.monotonic() + left) == ENDED\n", "time.monotonic() + left) in (b\"\", ENDED)\n",
        T_SHOWS + "test_of_a_child_that_fails_no_answer_is_taken",
        "what a child wrote before it failed is a unit's rows",
    ),
    one(
        "units", "a-child-counts-the-parts-of-its-input", CHILDREN,
        "socket.SO_RCVLOWAT, 2**31 - 1)", "socket.SO_RCVLOWAT, 1)",
        T_CONVERSION + "test_a_child_does_not_find_in_which_parts_its_input_came",
        "a child's memory tells how busy the machine was",
    ),
    one(
        "units", "a-child-knows-when-it-was-started", FORKS,
        "    logging._startTime = 0  #", "    #",
        T_SHOWS + "test_a_child_does_not_find_when_it_was_started",
        "what a converter makes of a unit follows from when the records were read",
    ),
    one(
        "units", "a-start-within-a-start", CHILDREN,
        '(told,) = self._run_once([b""], 2**16, json.loads)',
        '(told,) = self.run([b""], 2**16, json.loads, counts=False)',
        T_SHOWS + "test_a_program_that_dies_at_its_first_child_is_not_started_for_ever",
        "a program that dies at its first child is started hundreds of times",
    ),
    one(
        "units", "the-vaults-own-work-ends-a-child", CHILDREN,
        "                    left -= time.monotonic() - asked\n"
        "                    taken.append(take(answer))\n",
        "                    taken.append(take(answer))\n"
        "                    left -= time.monotonic() - asked\n",
        T_CONVERSION + "test_what_is_done_with_an_answer_takes_no_time_of_the_childs",
        "a patient with many images is left out by what the vault does with them",
    ),
    one(
        "units", "children-on-any-processor", FORKS,
        "        os.sched_setaffinity(0, {cpus[os.getppid() % len(cpus)]})\n", "        pass\n",
        T_CONVERSION + "test_all_children_run_on_one_processor",
        "a process beside moves children between processors, and so tells a converter anything",
    ),
    one(
        "units", "a-child-without-a-bound-of-memory", FORKS,
        "        (resource.RLIMIT_AS, used + settings[\"memory\"]),\n", "",
        T_CONVERSION + "test_memory_is_bounded", "one unit's conversion takes the machine's memory",
    ),
    one(
        "units", "a-process-that-forks-is-gone-for-all", CHILDREN,
        '            log.warning("the process that forks children ended; it is started again")\n'
        "            self._stop()\n",
        '            log.warning("the process that forks children ended; it is started again")\n',
        T_CONVERSION + "test_the_process_that_forks_is_started_again",
        "what ends it for one unit leaves all later ones empty",
    ),
    one(
        "units", "a-result-of-a-child-that-was-ended", CHILDREN,
        "if not is_whole or ended != DONE:", "if not is_whole:",
        T_SHOWS + "test_of_a_child_that_fails_no_answer_is_taken",
        "half a result is a unit's rows",
    ),
    one(
        "units", "one-broken-unit-breaks-the-file", PER_UNIT,
        "            return None\n        if not", "            raise\n        if not",
        T_OWN, "an exception about one unit's rows ends the reading of all",
    ),
    one(
        "units", "any-type-is-an-example", PER_UNIT,
        "        if not isinstance(found, list) or not all(isinstance(value, kinds) "
        "for value in found):\n            return None\n",
        "", T_OWN, "what a conversion returns fails later, where other units are too",
    ),
    one(
        "units", "not-a-number-comes-back", TYPED,
        "        elif isinstance(value, float) and not math.isfinite(value):\n"
        '            raise ValueError("not finite")\n',
        "", T_ROWS, "an infinite value of one unit reaches what all units share",
    ),
    one(
        "units", "as-many-values-as-it-likes", TYPED,
        "if len(content) > BYTES or sum(map(content.count, SEPARATORS)) > VALUES:",
        "if len(content) > BYTES:", T_ROWS,
        "sixteen megabytes of brackets are a gigabyte of lists in the vault",
    ),
    one(
        "units", "one-record-becomes-several", RECORDS,
        "if not converted or (len(converted) > 1 and not reading.by_patient):",
        "if not converted:",
        T_CONVERSION + "test_of_a_single_record_comes_at_most_one",
        "a record that is several units moves the sum by as many times C",
    ),
    one(
        "units", "an-image-of-somebody-else", RECORDS,
        "            return not isinstance(named, str) or column is None or named in own\n",
        "            return True\n",
        T_CONVERSION + "test_a_conversion_names_no_file_of_others",
        "a conversion names the image of another patient",
    ),
    one(
        "units", "an-example-knows-whose-it-is", "fedtune/core/data/load.py",
        "        scanned = self._scan(nameless)\n",
        "        scanned = self._scan([*records])\n",
        "tests/data/test_per_unit.py::"
        "test_what_makes_examples_learns_neither_whose_they_are_nor_where_they_stand",
        "a unit's key or place decides what is made of its rows",
    ),
    one(
        "units", "a-sum-by-another-way", "fedtune/core/dp/query.py",
        "return plan.step(len(rows), rows.dimension, drawn_rows, log, round_)",
        "return plan.clipped_sum(list(range(len(rows))), rows.dimension, drawn_rows).float()",
        "tests/dp/test_one_way_through.py::"
        "test_gradients_and_sums_are_touched_where_it_is_said",
        "a sum that was not noised is what leaves",
    ),
    one(
        "units", "no-sample-before-joining", "fedtune/officer/before_joining.py",
        "check_records, check_conversion)", "check_records)",
        T_CONVERSION + "test_a_sample_of_units_is_converted_again_alone",
        "nobody at the site hears of a conversion that couples units",
    ),
    one(
        "units", "a-plug-in-reads-the-whole-file", "fedtune/core/data/sources/__init__.py",
        ", foreign=False)", ")",
        "tests/data/test_sources.py::test_what_another_distribution_brings_is_no_source",
        "another distribution's code sees the rows of many units, in the vault",
    ),
)  # fmt: skip
