"""Bugs of what keeps a site's two halves apart: a vault on the network, a courier with records."""

from __future__ import annotations

from tests.mutants.mutant import one
from tests.mutants.places import STATES

CALLS = "fedtune/core/system_calls.py"
ISOLATION, COURIER = "fedtune/core/isolation.py", "fedtune/courier/process.py"
VAULT, STARTER = "fedtune/core/vault/process.py", "fedtune/launch/site.py"
APART, T_APART = "fedtune/launch/apart.py", "tests/isolation/test_apart.py::"
T_WAYS, T_HALVES = "tests/isolation/test_isolation.py::", "tests/isolation/test_halves.py::"
T_VAULT = T_WAYS + "test_no_way_leads_from_the_vault_to_a_network"
T_VIEW = "tests/isolation/test_own_view.py::"
T_DECIDES = "tests/isolation/test_what_a_courier_decides.py::"
T_COURIER = T_WAYS + "test_no_way_leads_from_the_courier_to_a_record_or_a_key"
SPOOL, T_SPOOL = "fedtune/core/wire/spool.py", "tests/wire/test_spool.py::"
T_SPOOLED = "tests/isolation/test_spooled.py::"
AIRLOCK, LEDGER = "fedtune/core/vault/airlock.py", "fedtune/core/ledger/ledger.py"
T_AIRLOCK, T_DRAW = "tests/client/test_airlock.py::", "tests/secagg/test_held.py::"

MUTANTS = (
    one(
        "isolation", "any-database-opens-sockets", VAULT,
        'any(kind_of(url) == "postgresql" for url in urls)', "bool(urls)",
        T_HALVES + "test_a_vault_opens_the_sockets_that_its_database_needs",
        "a vault whose records are a file reaches every Unix socket of the machine",
    ),
    one(
        "isolation", "shared-noise-is-tested-as-noise-of-one-site",
        "fedtune/core/vault/site_checks.py",
        ', "privacy", "secure_aggregation")', ', "privacy")',
        "tests/client/test_site.py::"
        "test_a_plan_of_another_kind_of_noise_is_tested_for_itself",
        "noise on the grid that sites share leaves a site untested",
    ),
    one(
        "isolation", "a-held-answer-is-handed-over-early", AIRLOCK,
        "    if ledger.is_held(slot):\n", "    if False:\n",
        T_AIRLOCK + "test_an_answer_waits_until_a_person_lets_it_go",
        "the courier has the update before anybody saw that it waits",
    ),
    one(
        "isolation", "a-refused-answer-is-handed-over", AIRLOCK,
        "    if ledger.is_refused(slot):\n", "    if False:\n",
        T_AIRLOCK + "test_a_refused_answer_stays_paid_and_is_never_made_again",
        "an officer's refusal lasts until the coordinator asks again",
    ),
    one(
        "isolation", "who-let-one-answer-go-let-the-next-go", LEDGER,
        '        return (slot, self._account.sent.get(slot, "")) in self._account.let_go\n',
        "        return any(slot == gone for gone, _ in self._account.let_go)\n",
        T_AIRLOCK + "test_other_bytes_of_the_same_round_wait_anew",
        "a round that is trained again goes without a person",
    ),
    one(
        "isolation", "a-query-does-not-wait", "fedtune/core/vault/evaluation.py",
        "held=airlock.holds_answers(site)", "held=False",
        T_AIRLOCK + "test_an_answer_about_held_out_records_waits_too",
        "two noised numbers leave a site that holds its answers",
    ),
    one(
        "isolation", "a-draw-is-made-before-it-is-let-go", "fedtune/core/vault/secure_round.py",
        "        _check_let_go(site, prepared, draw)\n", "",
        T_DRAW + "test_a_draw_waits_before_it_is_made_and_paid_for",
        "a draw is paid for, and other sites mask with one that a person refuses",
    ),
    one(
        "isolation", "the-vault-opens-sockets", ISOLATION,
        "    return spaces & _install(filter_of_vault, families)\n", "    return spaces\n", T_VAULT,
        "a daemon of this user's answers by its socket's path, whatever the network namespace",
    ),
    one(
        "isolation", "the-vault-stays-in-the-network", ISOLATION,
        "    spaces = _enter_own_network()\n", "    spaces = Confinement()\n", T_VAULT,
        "one of its two walls is not there, and nobody is told",
    ),
    one(
        "isolation", "a-pair-of-datagram-sockets-sends-to-a-path", CALLS,
        "(socket.SOCK_STREAM,)", "(socket.SOCK_STREAM, socket.SOCK_DGRAM)", T_VAULT,
        "sockets that need no connection reach a daemon without `socket`",
    ),
    one(
        "isolation", "the-other-table-of-calls-is-open", CALLS,
        "X32),\n        (GIVE, 0, 0, REFUSE),\n", "X32),\n        (GIVE, 0, 0, ALLOW),\n", T_VAULT,
        "x86-64 has a second number for each call",
    ),
    one(
        "isolation", "the-courier-reads-any-file", ISOLATION,
        "    of_files = _restrict_files(list(read), list(write), list(names))\n",
        "    of_files = Confinement((\"landlock 7\",))\n", T_COURIER,
        "what speaks to the network opens the records",
    ),
    one(
        "isolation", "the-courier-writes-on-the-ledgers-disk", COURIER,
        "own_view([*read, *write], [site.site.state / FOLDER])", "own_view([*read, *write], [])",
        T_VIEW + "test_what_a_courier_writes_takes_no_space_and_nobody_elses_processes_are_seen",
        "it takes the space that gives way in the midst of an order",
    ),
    one(
        "isolation", "the-courier-sees-every-files-length", COURIER,
        "own_view([*read, *write], [", 'own_view([Path("/")], [',
        T_VIEW + "test_a_courier_sees_neither_how_long_a_file_is_nor_when_it_was_changed",
        "a withdrawal, and a record more, by the length of a file whose name it knows",
    ),
    one(
        "isolation", "the-root-before-stays", ISOLATION,
        ' or _libc().umount2(b".", MNT_DETACH):\n', ":\n",
        T_VIEW + "test_a_courier_sees_neither_how_long_a_file_is_nor_when_it_was_changed",
        "all files of the machine are there by the path /..",
    ),
    one(
        "isolation", "the-kernel-drops-what-ends-a-courier", ISOLATION,
        "        for number in passed_on:\n", "        for number in ():\n",
        T_VIEW + "test_it_ends_as_its_child_ends_and_passes_signals_on",
        "until a handler is set, a courier that is asked to end goes on, on the network",
    ),
    one(
        "isolation", "nobody-hears-that-a-courier-ended", ISOLATION,
        "    signal.signal(signal.SIGCHLD, signal.SIG_DFL)", "    pass",
        T_VIEW + "test_it_ends_as_its_child_ends_and_passes_signals_on",
        "where whoever starts a client ignores that children end, it waits for a courier for good",
    ),
    one(
        "isolation", "the-courier-uses-up-the-users-processes", ISOLATION,
        "    _bound_processes()\n", "",
        T_VIEW + "test_how_many_processes_a_courier_can_start_says_nothing_of_others",
        "it starts processes until there are none for the other half, and counts its own",
    ),
    one(
        "isolation", "the-courier-limits-itself", CALLS,
        "_if_zero(FIRST, THIRD, THIRD + 4)", "_if_zero(FIRST)",
        T_COURIER,
        "by its own limit of processes it counts those of its user",
    ),
    one(
        "isolation", "half-of-a-pointer-is-looked-at", CALLS,
        "_if_zero(FIRST, THIRD, THIRD + 4)", "_if_zero(FIRST, THIRD)", T_COURIER,
        "a limit that lies where an address is null in its lower half is set",
    ),
    one(
        "isolation", "the-older-call-limits-too", CALLS,
        '**{"getrlimit": (97, 163)},', '**{"getrlimit": (97, 163), "setrlimit": (160, 164)},',
        T_COURIER,
        "by its own limit of processes it counts those of its user",
    ),
    one(
        "isolation", "the-courier-sets-a-pipes-size", CALLS,
        "*range(36, 39), 1030)", "*range(36, 39), 1030, 1031)", T_COURIER,
        "what is refused tells how much memory the pipes of the other half take",
    ),
    one(
        "isolation", "the-courier-asks-for-priorities", CALLS,
        '    "sched_getaffinity": ((204', '    "getpriority": ((140, 141), SECOND, (0,)),\n'
        '    "sched_getaffinity": ((204', T_COURIER,
        "the priority of its user's processes is that of the other half",
    ),
    one(
        "isolation", "the-courier-counts-the-machines-processes", ISOLATION,
        "_unshare(CLONE_NEWNS | CLONE_NEWPID)", "_unshare(CLONE_NEWNS)",
        T_VIEW + "test_what_a_courier_writes_takes_no_space_and_nobody_elses_processes_are_seen",
        "numbers of processes tell how many a round used up",
    ),
    one(
        "isolation", "a-couriers-log-grows-as-it-likes", "fedtune/core/processes.py",
        "            kept = said[:left]\n", "            kept = said\n",
        T_VIEW + "test_a_couriers_log_has_its_space_from_the_beginning_and_takes_no_more",
        "by its log it takes the space that gives way in the midst of an order",
    ),
    one(
        "isolation", "a-renewed-certificate-stays-in-memory", "fedtune/flower/forwarder.py",
        "                    if self._on_renewed:\n", "                    if False:\n",
        "tests/flower/test_forwarder.py::test_a_leaf_is_renewed_before_it_ends_and_used_at_once",
        "a site that starts again after its old certificate has ended is refused",
    ),
    one(
        "isolation", "the-courier-asks-a-daemon", ISOLATION,
        "(filter_of_courier, NETWORKS)", "(filter_of_courier, (*NETWORKS, socket.AF_UNIX))",
        T_COURIER,
        "systemd-run --user cat records",
    ),
    one(
        "isolation", "the-courier-limits-the-vaults-memory", CALLS,
        "_of_call(PRLIMIT, _if_zero(FIRST, THIRD, THIRD + 4))",
        "_of_call(PRLIMIT, [(GIVE, 0, 0, ALLOW)])", T_COURIER,
        "memory that runs out where the half on the network wants it to",
    ),
    one(
        "isolation", "the-courier-counts-pages-that-had-to-be-read", CALLS,
        '**{"getrlimit": (97, 163)},', '**{"getrlimit": (97, 163), "getrusage": (98, 165)},',
        T_COURIER,
        "which files of a library were read follows from records",
    ),
    one(
        "isolation", "a-log-without-space-takes-the-ledgers", "fedtune/core/processes.py",
        "    if not has_space:\n", "    if False:\n",
        T_VIEW + "test_a_log_for_which_there_is_no_space_is_not_kept",
        "on a disk that is full a courier's log takes what is left for an order",
    ),
    one(
        "isolation", "the-courier-opens-the-records-to-every-account", CALLS,
        'OF_COURIER: dict[str, Numbers] = {\n',
        'OF_COURIER: dict[str, Numbers] = {\n    **{"chmod": (90, None), "fchmodat": (268, 53)},\n',
        T_COURIER,
        "it changes who may read the records and the signing key",
    ),
    one(
        "isolation", "the-courier-sees-how-full-the-disk-is", ISOLATION,
        "(filter_of_courier, NETWORKS)", "(filter_of_vault, NETWORKS)", T_COURIER,
        "the ledger's disk fills with the records that it remembers",
    ),
    one(
        "isolation", "the-courier-watches-files", CALLS,
        'OF_COURIER: dict[str, Numbers] = {\n',
        'OF_COURIER: dict[str, Numbers] = {\n    **{"inotify_init1": (294, 26), '
        '"inotify_add_watch": (254, 27)},\n',
        T_COURIER, "Landlock does not rule who watches a folder: the names of all patients' files",
    ),
    one(
        "isolation", "the-courier-sees-which-pages-are-in-memory", CALLS,
        '    **{"statx": (332, 291), "close_range"',
        '    **{"preadv2": (327, 286), "statx": (332, 291), "close_range"', T_COURIER,
        "which pages of a library the other half has read since",
    ),
    one(
        "isolation", "root-listens-to-every-packet", CALLS,
        "        (IF_EQUAL, 1, 0, socket.SOCK_DGRAM),\n        (GIVE, 0, 0, REFUSE),\n",
        "        (IF_EQUAL, 1, 0, socket.SOCK_DGRAM),\n", T_COURIER,
        "what the other half and a database of this machine say to each other",
    ),
    one(
        "isolation", "the-courier-maps-the-disk", CALLS,
        '"ioctl": ((16, 29), SECOND, (*TERMINALS, *DESCRIPTORS)),',
        '"ioctl": ((16, 29), SECOND, (*TERMINALS, *DESCRIPTORS, 0xC0C0583B)),',
        T_COURIER, "every extent of the disk that the ledger is on, used and free",
    ),
    one(
        "isolation", "the-courier-ends-the-vault", ISOLATION,
        "    scoped = SCOPES if version >= 6 else 0\n", "    scoped = 0\n", T_COURIER,
        "a signal at a chosen moment of a round",
    ),
    one(
        "isolation", "the-courier-writes-the-keys", COURIER,
        "    return [site.site.state / FOLDER, *requests,",
        "    return [site.site.state / FOLDER, keys_folder(site), *requests,",
        T_HALVES + "test_a_courier_reads_its_own_keys_and_writes_its_own_folders_and_no_more",
        "it replaces the answer by which the site knows its coordinator",
    ),
    one(
        "isolation", "every-vault-has-its-database-far-away", VAULT,
        "    if any(map(is_over_tcp, urls)):\n", "    if True:\n",
        T_HALVES + "test_a_vault_reads_and_writes_what_it_did",
        "no site's vault leaves the network",
    ),
    one(
        "isolation", "required-is-preferred", STARTER,
        '        if missing and self._site.policy.isolation == "required":\n',
        "        if False:\n", T_HALVES + "test_what_is_required_and_lacking_ends_the_client",
        "a security officer's rule does nothing",
    ),
    one(
        "isolation", "a-courier-tells-anything", "fedtune/observe/from_courier.py",
        "    if event not in FROM_COURIER:\n        return None\n", "",
        T_HALVES + "test_a_courier_shows_only_what_it_may",
        "it forges what the person at the site reads",
    ),
    one(
        "isolation", "a-librarys-words-reach-the-screen", "fedtune/core/wire/events.py",
        'logging.getLogger("fedtune").addHandler', "logging.getLogger().addHandler",
        T_HALVES + "test_a_librarys_words_stay_in_the_vaults_own_log",
        "a tokenizer's warning may count or quote a record",
    ),
    one(
        "isolation", "names-of-files-below-fedtunes-own-folder", COURIER,
        "own_view([*read, *write], [",
        "own_view([*read, *write, Path(boot.PACKAGES)], [",
        T_HALVES + "test_a_courier_reads_no_names_of_files_beside_its_code",
        "images that are called after patients are listed by the half on the network",
    ),
    one(
        "isolation", "held-out-records-are-forgotten", COURIER,
        "(site.data, site.evaluation, site.acceptance)", "(site.data, site.acceptance)",
        T_HALVES + "test_a_courier_is_kept_from_all_that_is_private",
        "a second dataset lies where the courier reads its code, and nobody is told",
    ),
    one(
        "isolation", "records-of-an-acceptance-are-forgotten", COURIER,
        "(site.data, site.evaluation, site.acceptance)", "(site.data, site.evaluation)",
        T_HALVES + "test_a_courier_is_kept_from_all_that_is_private",
        "held-out patients lie where the courier reads its code, and nobody is told",
    ),
    one(
        "isolation", "the-courier-inherits-the-databases-password", "fedtune/core/processes.py",
        '        if program == "courier":\n', "        if False:\n",
        T_HALVES + "test_a_courier_does_not_get_the_databases_password_with_its_environment",
        "what speaks to the network logs in to the records' database",
    ),
    one(
        "isolation", "a-databases-password-lies-where-the-courier-reads", COURIER,
        "        if table.url:\n            yield from secrets_of(table.url)\n", "",
        T_HALVES + "test_a_password_where_a_courier_reads_is_said_to_be_open",
        "a password below /etc opens the database to it, and nobody is told",
    ),
    one(
        "isolation", "the-metrics-port-counts-the-ledgers-entries", "fedtune/observe/metrics.py",
        '            "rounds_released": (',
        '            "entries": ("", book.head.seq if book else 0),\n'
        '            "rounds_released": (',
        "tests/observe/test_metrics.py"
        "::test_the_port_says_nothing_of_what_the_ledger_enters_of_records",
        "the half on the network sees that a patient withdrew",
    ),
    one(
        "isolation", "the-metrics-port-trusts-the-other-sites", "fedtune/observe/metrics.py",
        "alone = [charge.fallback for charge in paid]",
        "alone = [charge.event for charge in paid]",
        "tests/observe/test_metrics.py"
        "::test_a_sites_budget_of_shared_noise_also_holds_whatever_happens",
        "a dashboard shows budget left where a site's own noise alone has used it up",
    ),
    one(
        "isolation", "the-metrics-port-adds-up-all-memberships", "fedtune/observe/metrics.py",
        " if each.charge.is_paid_by(own)]", "]",
        "tests/observe/test_metrics.py"
        "::test_a_memberships_port_shows_no_other_memberships_spending",
        "a coordinator learns of another consortium, and when its rounds ran",
    ),
    one(
        "costs", "a-round-after-queries-forgets-them", "fedtune/core/vault/budget.py",
        "plans = digest, digest + QUERIES", "plans = (digest,)",
        "tests/test_private_evaluation.py"
        "::test_a_study_keeps_below_its_ceiling_in_whatever_order_it_asks",
        "queries first, then rounds again: past the site's ceiling for a study",
    ),
    one(
        "isolation", "one-word-lets-two-answers-go", "fedtune/core/ledger/files.py",
        "hexdigest()[:32]", "hexdigest()[:12]",
        "tests/dp/test_ledger_files.py"
        "::test_what_a_coordinator_chose_to_be_called_alike_has_two_names",
        "an officer lets go what a coordinator made to have the name of something else",
    ),
    one(
        "isolation", "two-plans-of-one-file", "fedtune/core/config/site.py",
        "removeprefix('sha256:')}.json", "removeprefix('sha256:')[:16]}.json",
        "tests/dp/test_ledger_files.py"
        "::test_what_a_coordinator_chose_to_be_called_alike_has_two_names",
        "a person signs another plan than was read",
    ),
    one(
        "isolation", "purge-follows-a-link", "fedtune/officer/purge.py",
        "os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd", "os.O_DIRECTORY, dir_fd",
        "tests/client/test_purge.py"
        "::test_a_link_in_a_folders_place_deletes_nothing_elsewhere",
        "the half on the network has the signing key and the receipts deleted",
    ),
    one(
        "isolation", "a-log-is-written-through-a-link", "fedtune/core/processes.py",
        "flags | os.O_NOFOLLOW, 0o600", "flags, 0o600",
        T_HALVES + "test_a_childs_log_is_not_written_through_a_link",
        "a link that a courier left empties the ledger at the next start",
    ),
    one(
        "isolation", "a-library-starts-threads-first", "fedtune/core/wire/requests.py",
        "if TYPE_CHECKING:  # NumPy", "if True:  # NumPy",
        T_HALVES + "test_a_half_imports_no_library_that_starts_threads_before_it_is_confined",
        "no vault starts where the number of threads is left to NumPy",
    ),
    one(
        "isolation", "anybody-is-a-courier", APART,
        "return bool(user == os.getuid())", "return True",
        T_APART + "test_another_user_is_not_spoken_to",
        "another user of the machine is handed the requests and the events of a site",
    ),
    one(
        "isolation", "the-socket-is-for-all", APART,
        "OWN = 0o177", "OWN = 0o000",
        T_APART + "test_the_socket_is_of_its_user_alone_and_goes_with_the_vault",
        "one of the two things that keep other users from a vault is not there",
    ),
    one(
        "isolation", "half-an-event-is-waited-for", "fedtune/launch/event_reader.py",
        "        os.set_blocking(connection.fileno(), False)\n", "",
        T_DECIDES + "test_half_an_event_keeps_nobody_waiting",
        "the vault stands still after as many orders as its records make events",
    ),
    one(
        "isolation", "a-half-waits-for-its-screen", "fedtune/core/wire/events.py",
        "        self._left_out = 0\n        os.set_blocking(connection.fileno(), False)\n",
        "        self._left_out = 0\n",
        T_DECIDES + "test_a_screen_that_stands_still_keeps_no_half_waiting",
        "the vault stands still after as many orders as its records make events",
    ),
    one(
        "isolation", "a-courier-says-again-how-it-is-confined", "fedtune/launch/site.py",
        "        if half in self._confined:\n", "        if False:\n",
        T_DECIDES + "test_how_the_halves_are_confined_is_told_once_and_entered_once",
        "each time an entry of the audit log, on the ledger's disk, in the midst of an order",
    ),
    one(
        "isolation", "a-sites-log-grows-on-the-ledgers-disk", "fedtune/observe/log.py",
        'if self._role == "site":\n            if self._has_space is None',
        "if not self._role:\n            if self._has_space is None",
        T_DECIDES + "test_a_sites_log_takes_its_space_at_its_first_event",
        "a courier takes the ledger's space in the midst of an order, by what it tells",
    ),
    one(
        "isolation", "a-vaults-log-grows-on-the-ledgers-disk", "fedtune/core/processes.py",
        "pipe = program in AT_A_SITE", 'pipe = program == "courier"',
        "tests/isolation/test_own_view.py::"
        "test_a_couriers_log_has_its_space_from_the_beginning_and_takes_no_more",
        "what a vault says of records, and of what a courier asks, takes space beside the room",
    ),
    one(
        "isolation", "a-full-log-stays", "fedtune/observe/log.py",
        "if self._has_space is None or (self._has_space and length > OF_SITE):",
        "if self._has_space is None:",
        T_DECIDES + "test_a_sites_log_takes_no_space_while_an_order_is_answered",
        "a site's log ends with its first file, and nobody is told",
    ),
    one(
        "isolation", "a-log-takes-space-in-the-midst-of-an-order", "fedtune/observe/log.py",
        "            if not is_now:\n", "            if False:\n",
        T_DECIDES + "test_a_sites_log_takes_no_space_while_an_order_is_answered",
        "a courier chooses when the ledger's room loses a mebibyte",
    ),
    one(
        "isolation", "a-status-is-written-in-the-midst-of-an-order", "fedtune/observe/status.py",
        "                if is_now:\n", "                if True:\n",
        T_DECIDES + "test_a_sites_status_is_written_while_no_order_is_answered",
        "a file that is there twice for a moment, when the courier likes, on the ledger's disk",
    ),
    one(
        "isolation", "a-status-is-as-long-as-what-it-says", "fedtune/observe/status.py",
        "text.ljust(math.ceil(len(text) / OF_SITE) * OF_SITE)", "text",
        T_DECIDES + "test_a_sites_status_is_written_while_no_order_is_answered",
        "how much the disk has left follows from what a person at the site is told",
    ),
    one(
        "isolation", "a-certificate-is-kept-in-the-midst-of-an-order", "fedtune/launch/site.py",
        "if not is_now or self._certificate is None:", "if self._certificate is None:",
        T_DECIDES + "test_a_renewed_certificate_is_kept_while_no_order_is_answered",
        "a file that is there twice for a moment, when the courier likes, on the ledger's disk",
    ),
    one(
        "isolation", "a-ranks-log-takes-space-in-the-midst-of-an-order",
        "fedtune/core/processes.py",
        'if pipe and program != "rank":', "if pipe:",
        T_DECIDES + "test_the_logs_of_a_sites_ranks_take_no_space_while_an_order_is_answered",
        "the ledger's room loses a mebibyte for each process that shares the first round",
    ),
    one(
        "isolation", "a-courier-fills-the-screen", "fedtune/launch/site.py",
        "        if size > self._left:\n", "        if False:\n",
        T_DECIDES + "test_what_a_courier_tells_is_shown_up_to_a_length",
        "a container's log grows on the ledger's disk, when the courier likes",
    ),
    one(
        "isolation", "a-ranks-first-row-starts-its-threads",
        "fedtune/core/vault/rank_process.py", "        self._start_threads()\n", "",
        "tests/client/test_ranks.py::"
        "test_a_process_that_was_given_no_row_starts_no_thread_with_its_first",
        "how many numbers of threads an order uses up says whether two were drawn",
    ),
    one(
        "isolation", "the-first-text-starts-threads", "fedtune/core/processes.py",
        '        os.environ["TOKENIZERS_PARALLELISM"] = "false"\n', "",
        "tests/guarantee/test_process_numbers.py::test_no_first_text_starts_threads",
        "how many numbers of threads an order uses up says whether anybody has a label",
    ),
    one(
        "isolation", "a-vault-writes-byte-code", "fedtune/core/processes.py",
        "        sys.dont_write_bytecode = True\n", "",
        T_DECIDES + "test_a_librarys_warning_is_in_no_log_of_a_site",
        "a library that one record needs leaves a file that the courier may list",
    ),
    one(
        "isolation", "a-cell-has-a-module-imported", "fedtune/core/data/sources/_arrow.py",
        "    _import_what_cells_need([schema.field(name).type for name in columns])\n", "",
        "tests/data/test_modules_of_cells.py::test_no_cell_has_a_module_imported",
        "which files are read follows from one record's value",
    ),
    one(
        "isolation", "a-scrape-reads-the-ledger", "fedtune/observe/metrics.py",
        "        figures = self._shown\n", "        self.read()\n        figures = self._shown\n",
        "tests/observe/test_metrics.py::test_a_scrape_does_not_read_the_ledger",
        "how long a scrape takes tells that the ledger has an entry more, such as a withdrawal",
    ),
    one(
        "isolation", "a-refused-plan-begins-a-ledger", "fedtune/core/vault/reply_facts.py",
        "        if site.has_ledger and (spent", "        if True and (spent",
        "tests/client/test_reply_facts.py::test_a_refused_plan_of_declared_data_begins_no_ledger",
        "whoever sends plans fills the disk beside the ledger's room, at no cost",
    ),
    one(
        "isolation", "a-waiting-plan-begins-a-ledger", "fedtune/core/vault/reply_facts.py",
        "        if site.has_ledger and (spent",
        "        if (status == WAITING or site.has_ledger) and (spent",
        "tests/client/test_reply_facts.py::test_a_refused_plan_of_declared_data_begins_no_ledger",
        "whoever sends plans that wait for a person fills the disk, at no cost",
    ),
    one(
        "isolation", "an-admitted-plan-begins-a-ledger", "fedtune/core/vault/worker.py",
        "            if round_ is None:\n                return site\n", "",
        "tests/client/test_reply_facts.py::test_a_refused_plan_of_declared_data_begins_no_ledger",
        "plans with made-up bases, refused after the ledger was begun, fill the disk at no cost",
    ),
    one(
        "isolation", "a-plan-that-nobody-signed-is-kept", "fedtune/core/vault/answers.py",
        "        coordinator = check_plan(plan, study.digest)\n",
        "        site.keep_run(study.digest, site.begin_run(study.digest))\n"
        "        coordinator = check_plan(plan, study.digest)\n",
        "tests/client/test_reply_facts.py::test_a_refused_plan_of_declared_data_begins_no_ledger",
        "whoever sends plans fills the memory of the half with the records, at no cost",
    ),
    one(
        "isolation", "an-order-does-not-wait-for-a-log", "fedtune/core/files/room.py",
        "with locks.hold(_lock_of(self.folder, self.membership)), self._given_up():",
        "with self._given_up():",
        T_DECIDES + "test_a_sites_log_takes_no_space_while_an_order_is_answered",
        "a courier chooses when the ledger's room loses a mebibyte",
    ),
    one(
        "isolation", "a-log-asks-for-its-space-again", "fedtune/observe/log.py",
        "if self._has_space is None or", "if not self._has_space or",
        T_DECIDES + "test_a_log_whose_disk_has_not_its_space_asks_once",
        "asking takes all that is free for a moment, as often as a courier likes",
    ),
    one(
        "isolation", "a-courier-that-comes-again-fills-the-disk", "fedtune/launch/site.py",
        "        if not site.room.has_space(LONGEST):\n", "        if False:\n",
        T_DECIDES + "test_no_entry_is_made_where_the_ledgers_room_would_give_way",
        "a courier from another container says something else at each start, without end",
    ),
    one(
        "isolation", "a-librarys-warning-is-in-a-vaults-log", "fedtune/core/processes.py",
        'warnings.simplefilter("ignore")', "pass",
        T_DECIDES + "test_a_librarys_warning_is_in_no_log_of_a_site",
        "a line for one record, and the library's own file is read to show it",
    ),
    one(
        "isolation", "a-link-leads-into-the-couriers-view", "fedtune/core/isolation.py",
        "if path.is_file() and not path.is_symlink())", "if path.is_file())",
        T_DECIDES + "test_nothing_behind_a_link_is_brought_into_a_view",
        "a link that lies in the courier's folder has a key copied there",
    ),
    one(
        "isolation", "counts-take-the-space-that-they-need", "fedtune/core/vault/reading.py",
        "text.ljust(whole)", "text",
        T_DECIDES + "test_counts_of_records_take_as_much_whatever_they_are",
        "how full the disk is beside the room follows from how many rows were rejected",
    ),
    one(
        "resources", "states-take-what-the-room-lends", STATES,
        "< size + least_free:", "< size + LEAST_FREE:",
        "tests/models/test_states.py::test_what_the_ledgers_room_gave_up_is_not_the_states",
        "how long all records are decides whether the next order is answered",
    ),
    one(
        "resources", "a-site-does-not-say-what-its-room-lends", "fedtune/core/vault/worker.py",
        "        PREFIX_STORE.leave_free(self.room.lent)\n", "",
        "tests/client/test_ranks.py::"
        "test_states_of_every_process_leave_free_what_the_room_of_the_ledger_lends",
        "how long all records are decides whether the next order is answered",
    ),
    one(
        "isolation", "a-second-courier-is-let-in", APART,
        'connection.sendall(json.dumps({"refused": "another courier is there"}).encode())',
        "ConnectedCourier(connection).hand_over(asks=0, tells=0, once=False, patience=1.0)",
        T_APART + "test_a_courier_gets_its_two_ends_and_the_second_none",
        "two couriers speak for one site at once",
    ),
    one(
        "isolation", "no-landlock-is-no-matter", COURIER,
        "is_elsewhere = not _try_to_read(site).missing", "is_elsewhere = True",
        T_APART + "test_without_landlock_a_courier_counts_as_confined_only_where_no_record_is",
        "a courier beside the records, without Landlock, is shown as one that cannot read them",
    ),
    one(
        "isolation", "a-wall-that-is-not-there-goes-unsaid", COURIER,
        "left, found.reasons)", "left)",
        T_APART + "test_without_landlock_a_courier_counts_as_confined_only_where_no_record_is",
        "a courier in a container of its own, without Landlock or a view, looks like any other",
    ),
    one(
        "isolation", "a-courier-chooses-the-words-of-a-log", "fedtune/observe/log.py",
        "wall if isinstance(wall, str) and WALL.fullmatch(wall) else OTHER", "str(wall)",
        T_HALVES + "test_a_courier_does_not_choose_the_words_of_a_log",
        "the half on the network writes into the log of the other one's machine",
    ),
    one(
        "isolation", "a-couriers-certificate-is-beside-the-ledger", "fedtune/flower/link.py",
        "(self.own or self.keys / RENEWED)", "(self.keys / RENEWED)",
        "tests/flower/test_forwarder.py::test_who_only_reads_the_keys_keeps_a_renewal_elsewhere",
        "in a container of its own it writes in a volume on the ledger's disk",
    ),
    one(
        "isolation", "a-spools-file-is-read-through-a-link", SPOOL,
        "    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK |",
        "    flags = os.O_RDONLY | os.O_NONBLOCK |",
        T_SPOOL + "test_what_is_no_file_of_the_couriers_is_not_read",
        "a courier has the vault open whatever file it names",
    ),
    one(
        "isolation", "a-spools-file-has-a-second-name", SPOOL,
        " or status.st_nlink != 1:", ":",
        T_SPOOL + "test_what_is_no_file_of_the_couriers_is_not_read",
        "a courier has the vault read a file of another folder",
    ),
    one(
        "isolation", "a-spools-folder-is-a-link", SPOOL,
        "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC",
        "os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC",
        T_SPOOL + "test_a_folder_that_became_a_link_is_not_used",
        "the vault removes files of a folder that a courier chose",
    ),
    one(
        "isolation", "a-request-is-answered-by-its-name-alone", SPOOL,
        "if content is not None and hashlib.sha256(content).hexdigest() != name:", "if False:",
        T_SPOOL + "test_a_file_that_is_rewritten_while_it_is_read_is_judged_by_what_was_read",
        "half a request is answered, and the answer stands for the whole one",
    ),
    one(
        "isolation", "a-flood-is-worked-through", SPOOL,
        "            if len(listed) > MOST:\n", "            if False:\n",
        T_SPOOL + "test_a_flood_of_files_is_refused_and_passes",
        "every look at the folder takes as long as a courier wants it to",
    ),
    one(
        "isolation", "an-answer-is-written-in-its-place", SPOOL,
        '    draft = f"{name}.{secrets.token_hex(4)}.{os.getpid()}.new"\n', "    draft = name\n",
        T_SPOOL + "test_what_a_killed_half_left_is_no_request_and_no_answer",
        "half an answer is taken for a whole one",
    ),
    one(
        "isolation", "a-request-has-the-name-of-an-earlier-one", SPOOL,
        "secrets.token_hex(16)", '"0" * 32',
        T_SPOOL + "test_the_same_request_again_has_another_name",
        "an answer that was left is taken for one to a plan that the site would refuse now",
    ),
    one(
        "isolation", "any-answer-is-this-requests", SPOOL,
        '        if head.get("request") != name:\n', "        if False:\n",
        T_SPOOL + "test_an_answer_to_another_request_is_not_taken",
        "an answer under another name is sent to the coordinator",
    ),
    one(
        "isolation", "an-answers-file-is-dated", SPOOL,
        "dated=False)", "dated=True)",
        T_SPOOL + "test_an_answers_file_says_nothing_beside_its_content",
        "when it was computed stands beside it, for whoever reads the folder later",
    ),
    one(
        "isolation", "a-draw-is-made-by-a-vault-for-one-request", "fedtune/core/vault/policy.py",
        "    if study.secure_aggregation and site.vault:\n", "    if False:\n",
        T_SPOOLED + "test_a_plan_with_shared_noise_is_refused_where_a_vault_lives_for_one_request",
        "a draw is paid for whose key is gone before it is masked",
    ),
    one(
        "isolation", "the-courier-writes-answers", COURIER,
        "requests = [spool.requests] if spool", "requests = [spool.path] if spool",
        T_SPOOLED + "test_a_courier_writes_requests_and_reads_answers_and_no_more",
        "it removes the folder in which the vault looks, and puts another there",
    ),
    one(
        "isolation", "what-nobody-waits-for-is-asked-again", COURIER,
        "    spool.withdraw_all()\n", "",
        T_SPOOLED
        + "test_a_courier_withdraws_what_was_asked_before_it_and_what_nobody_waits_for",
        "a round of which nobody takes the answer is paid for",
    ),
    one(
        "isolation", "a-plan-answered-with-other-settings-is-known",
        "fedtune/core/vault/kept_plans.py",
        'exclude={"policy"}', 'include={"hospital"}',
        T_SPOOLED
        + "test_a_query_that_comes_between_two_orders_waits_until_a_person_starts_the_site",
        "after a start with a query, the coordinator is not told that a query selects the records",
    ),
    one(
        "isolation", "a-plan-is-reviewed-by-the-next-start", "fedtune/officer/review.py",
        "if not (held(site.site.state / LOCK) and kept.is_file()):", "if True:",
        T_SPOOLED + "test_a_plan_is_reviewed_by_the_size_at_which_the_site_runs",
        "a person signs for less ε than the running site pays",
    ),
    one(
        "isolation", "a-kept-plan-outlives-its-study", "fedtune/core/vault/kept_plans.py",
        'set(folder.glob("*.request")) - known', "[]",
        T_SPOOLED + "test_a_plan_is_kept_as_long_as_its_study_is_under_way",
        "plans pile up on the ledger's disk",
    ),
    one(
        "isolation", "a-vault-works-with-what-the-file-says-when-it-starts", VAULT,
        "start_worker(path, site)", "start_worker(path, load_site(Path(path)))",
        T_SPOOLED
        + "test_a_query_that_comes_between_two_orders_waits_until_a_person_starts_the_site",
        "a query that comes in mid-study trains, and nobody outside the site hears of it",
    ),
    one(
        "isolation", "the-tables-of-the-first-start-stay", "fedtune/core/config/checked.py",
        "if path.read_bytes() == content:", "if path.read_bytes():",
        T_SPOOLED
        + "test_a_size_that_is_corrected_between_two_orders_waits_until_a_person_starts_the_site",
        "what a person starts anew takes part with a size that nobody states any more",
    ),
    one(
        "isolation", "other-tables-than-the-clients-are-checked", STARTER,
        "if load_checked(checked_file(site), path) != site:", "if False:",
        T_SPOOLED + "test_a_start_stores_the_tables_that_it_checked_and_no_others",
        "a file that is saved at the wrong moment is half that of the client, half of its vault",
    ),
)  # fmt: skip
