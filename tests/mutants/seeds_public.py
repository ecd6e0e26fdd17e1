"""Seeded bugs in what is made of public text: the preconditioner and what a study starts at."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, one

GRADIENTS = "fedtune/core/training/unit_gradients.py"
MODULE, LORA = "fedtune/core/models/preconditioner.py", "fedtune/core/models/lora.py"
T = "tests/test_preconditioner.py::"
S = "tests/server/test_step.py::"
PUBLIC, RECIPE, ANSWER = (
    "fedtune/presets/_public.py", "fedtune/presets/_adapter.py", "tests/test_preset_answer.py::"
)  # fmt: skip

MUTANTS: list[Mutant] = [
    one(
        "expected-gain", "without-the-noise", "fedtune/evaluation/expected_gain.py",
        "            sums += noise * random.standard_normal(sums.shape)\n", "",
        "tests/test_before_paying.py::test_the_gain_that_is_found_lies_where_it_was_foretold",
        "a study is promised a gain that its own noise takes away",
    ),
    one(
        "expected-gain", "as-sure-of-what-hangs-on-names", "fedtune/evaluation/expected_gain.py",
        "WIDER if self.rough else 1.0", "1.0",
        "tests/test_before_paying.py::test_a_forecast_that_hangs_on_names_is_twice_as_wide",
        "two in five promises are wrong where public records lack classes",
    ),
    Mutant(
        "preconditioner", "applied-after-the-clip", GRADIENTS,
        (
            ("                factor(per_record.view(n_records, *trained.shape))\n",
             "                pass\n"),
            ("view.copy_(factor(change.clone()[None])[0]", "view.copy_(factor(change[None])[0]"),
        ),
        (T + "test_what_leaves_is_clipped_after_m",),
        "a unit moves what is sent by the largest eigenvalue of M times C",
    ),
    one(
        "preconditioner", "from-the-sites-own-records", GRADIENTS,
        "return _Factor(found.identity, found.sign, wide)",
        "return _Factor(found.identity + 1e-4 * len(network.states), found.sign, wide)",
        T + "test_m_does_not_follow_from_who_is_there", "every row follows from who is there",
    ),
    one(
        "preconditioner", "of-any-spectrum", MODULE,
        "if not (rank < outputs and b - float(values.max(initial=0.0)) >= LEAST):",
        "if not rank < outputs:",
        T + "test_what_a_hostile_coordinator_sends_is_refused",
        "a coordinator makes a site compute with an M of any condition",
    ),
    one(
        "preconditioner", "narrow-of-any-scale", MODULE,
        "if not (rank < outputs and abs(squares / outputs - 1) <= SCALE):",
        "if not rank < outputs:",
        T + "test_a_hostile_narrow_one_is_refused",
        "a coordinator makes a site compute with an M of any scale",
    ),
    one(
        "preconditioner", "narrow-before-the-round-too", "fedtune/public/start.py",
        "network.loaded(frozen=network.frozen_factor() | outputs):",
        "network.loaded():",
        "tests/test_public_start.py::"
        "test_steps_before_the_first_round_train_what_a_narrow_round_leaves",
        "steps on public text, which have no noise, learn in few directions alone",
    ),
    one(
        "preconditioner", "not-the-plans", LORA,
        "if wanted.digest not in (None, digest(outputs)):", "if False:",
        T + "test_the_digest_binds_it",
        "a site trains with another M than the plan that was signed",
    ),
    one(
        "preconditioner", "left-out-of-the-step", MODULE,
        "    if not factors:\n", "    if True:\n",
        T + "test_a_round_is_the_round_written_out",
        "gradients are preconditioned and the step is not: half of the gain",
    ),
    one(
        "preconditioner", "left-out-of-local-steps", GRADIENTS,
        "[0].add_(before).clamp_(-LARGEST, LARGEST))",
        "[0].zero_().add_(change).add_(before).clamp_(-LARGEST, LARGEST))",
        T + "test_a_round_is_the_round_written_out",
        "the second step of a round starts elsewhere than the coordinator thinks",
    ),
    one(
        "preconditioner", "not-loaded-beside-a-drawn-a", "fedtune/core/models/network.py",
        "whole = factor | outputs ", "factor |= outputs; whole = factor ",
        T + "test_the_digest_binds_it", "a site trains without the M that its plan names",
    ),
    one(
        "preconditioner", "left-open-by-the-plan", "fedtune/core/vault/policy.py",
        "if table.digest is None and not outline:", "if False:",
        T + "test_a_site_takes_no_plan_that_leaves_it_open",
        "a site signs a plan that does not say with which M it trains",
    ),
    one(
        "plans", "a-sent-one-may-be-open-too", "fedtune/officer/review.py",
        "    if path.suffix in SENT:\n        return False", "    if False:\n        return False",
        "tests/test_before_a_run.py::test_a_plan_that_was_sent_without_its_digests_is_refused",
        "review says that a plan would run which the site refuses when it comes",
    ),
    one(
        "preconditioner", "of-any-rank", "fedtune/core/vault/policy.py",
        '_at_most("lora.preconditioner.rank", table.rank, "max_rank", policy)', "()",
        T + "test_a_site_takes_no_plan_that_leaves_it_open",
        "a coordinator decides how long a site's check takes",
    ),
    one(
        "start", "not-in-the-plan", "fedtune/public/start.py",
        'pinned = study.start.model_copy(update={"digest": lora.digest(adapter)})',
        'pinned = study.start.model_copy(update={"digest": None})',
        "tests/test_public_start.py::test_it_costs_no_epsilon_and_is_bound_by_the_digest",
        "a site cannot tell what the study that it signed started at",
    ),
    one(
        "selection", "the-evaluation-records-choose", "fedtune/server/step.py",
        'update={"path": table.path, "columns": table.columns})',
        'update={"columns": table.columns})',
        S + "test_the_records_that_choose_are_the_selections",
        "the figures in the report are of the records that chose the adapter",
    ),
    one(
        "selection", "a-step-that-helps-nothing-is-taken", "fedtune/server/step.py",
        "    if untouched - loss(keep, factor) <= TOLERANCE * abs(untouched):\n", "    if False:\n",
        S + "test_a_gain_of_nothing_is_no_step",
        "a study goes on spending where it learns no more",
    ),
    one(
        "selection", "all-of-the-past-is-kept", "fedtune/server/step.py",
        "while keep > LEAST and", "while False and",
        S + "test_new_noise_is_averaged_with_old", "the noise of every round adds up",
    ),
    one(
        "selection", "a-loss-that-rises-is-a-step", "fedtune/server/step.py",
        "return start * 2.0**best if at(best) < untouched else 0.0", "return start * 2.0**best",
        S + "test_the_search_is_within_a_factor_of_the_best",
        "the newest round is kept where an earlier one was better",
    ),
    one(
        "selection", "evaluated-every-round", "fedtune/server/rounds.py",
        "every = 0 if self.study.selection else", "every =",
        S + "test_each_round_moves_as_far_as_the_selection_records_say",
        "the test records are read before the adapter is chosen",
    ),
    one(
        "selection", "shared-records-are-no-matter", "fedtune/evaluation/selection.py",
        "if shared := len(contents[first] & contents[second]):", "if shared := 0:",
        S + "test_records_that_choose_do_not_judge",
        "the same public records choose the adapter and judge it",
    ),
    one(
        "csv", "a-site-guesses-how-its-file-is-written", "fedtune/core/data/records.py",
        "    if not isinstance(file, SiteData):\n"
        "        return guess_format(file.path, keys_of(file).values())",
        "    if not getattr(file, 'source', '') and not getattr(file, 'url', ''):\n"
        "        return guess_format(file.path, filter(None, file.columns.model_dump().values()))",
        "tests/data/test_rows.py::test_how_a_public_csv_is_written_is_guessed_and_a_sites_never",
        "one patient's accent changes how every other patient's text is read",
    ),
    one(
        "start", "what-is-learnt-judges-too", "fedtune/evaluation/selection.py",
        '"public": taught_by(study),', '"public": None,',
        S + "test_records_that_teach_neither_choose_nor_judge",
        "a head that was fitted to the evaluation records is judged by them",
    ),
    one(
        "start", "the-head-forgets-the-public-records", "fedtune/public/start.py",
        'if study.start.head == "public":', "if False:",
        "tests/test_public_start.py"
        "::test_a_head_starts_at_the_optimum_of_a_regression_on_public_records",
        "small sites pay for what public records could have taught for nothing",
    ),
    one(
        "preset", "no-room-for-a-repeated-round", "fedtune/presets/_sites.py",
        "EPSILON = 4.9", "EPSILON = 5.0",
        "tests/test_preset_tasks.py::test_a_budget_has_room_for_the_study_twice",
        "one crash of a client ends its part in the study",
    ),
    one(
        "preset", "a-patient-in-two-parts", PUBLIC,
        "units.setdefault(str(whose) if whose else number, {})", "units.setdefault(number, {})",
        ANSWER + "test_no_patient_is_in_two_parts_of_the_public_records",
        "what a patient's one record taught is judged on another",
    ),
    one(
        "preset", "what-chose-judges-too", PUBLIC,
        "        public[name] += unit\n",
        '        public[name] += unit\n        if name == "selection":\n'
        '            public["evaluation"] += unit\n',
        "tests/test_presets.py::test_it_loads_without_an_edit_and_its_public_records_are_divided",
        "the same public records choose the step and judge it",
    ),
    one(
        "preset", "what-was-learnt-from-judges-too", PUBLIC,
        "seen = {json.dumps(row, sort_keys=True) for row in but}", "seen = set[str]()",
        ANSWER + "test_other_public_records_are_learnt_from_and_none_of_them_judges",
        "a public record that taught the start is among those that judge",
    ),
    one(
        "preset", "a-step-for-any-noise", RECIPE,
        "return min(longest, NOISE / noise_of_mean(records))", "return longest",
        ANSWER + "test_the_step_follows_the_noise_as_medquads_best_ones_did",
        "a round at a small ε moves the adapter by noise alone",
    ),
    one(
        "start", "the-gain-is-of-both", "fedtune/evaluation/evaluator.py",
        "intervals(self.scores(start), after,", "intervals(before, after,",
        "tests/test_public_start.py::test_a_whole_run_with_both",
        "what public text gave is called a gain of the sites' records",
    ),
]  # fmt: skip
