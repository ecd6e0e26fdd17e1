"""Seeded bugs of derived models and of studies without a last round."""

from __future__ import annotations

from tests.mutants.mutant import one as _one
from tests.mutants.places import (
    BUDGETS,
    CHANGE_PLAN,
    CONTINUOUS,
    LABEL,
    LORA,
    MERGE,
    PAIRED,
    SITE,
    T_ARRIVALS,
    T_BUDGETS,
    T_COHORTS,
    T_LOOKS,
    T_MERGE,
    T_VERDICTS,
    T_VERSIONS,
    VERDICTS,
)

MADE_MUTANTS = (
    _one(
        26, "the-judge-sees-the-record-before", LABEL,
        "        tokenizer: Any = self.model.tokenizer\n",
        "        earlier = globals().get('_before', '')\n"
        "        question, globals()['_before'] = earlier + question, question\n"
        "        tokenizer: Any = self.model.tokenizer\n",
        "tests/test_label.py::test_another_units_records_change_no_byte",
        "the judge's prompt contains another patient's question",
    ),
    _one(
        "derived", "an-exported-teacher-is-a-base", "fedtune/runs/teacher_admission.py",
        "        if is_exported(folder):\n", "        if False:\n",
        "tests/test_label.py::test_an_exported_model_is_neither_base_nor_known",
        "a signed report says that a teacher which trained on the sites' records did not",
    ),
    _one(
        "derived", "an-exported-judge-is-a-base", "fedtune/derive/lineage.py",
        "    elif is_exported(model.base.path):\n", "    elif False:\n",
        "tests/test_label.py::test_an_exported_model_is_neither_base_nor_known",
        "a model trained without noise on the records writes their answers",
    ),
    _one(
        "derived", "a-run-on-an-exported-model-is-private", "fedtune/derive/lineage.py",
        "    if is_exported(base):\n", "    if False:\n",
        "tests/test_label.py::test_a_run_on_an_exported_model_is_private_for_nothing",
        "a run whose base was trained without noise on the records writes their answers",
    ),
    _one(
        "derived", "a-teacher-on-an-exported-model-is-paid", "fedtune/runs/teacher_admission.py",
        "        if is_exported(Path(load_plan(folder).base.model)):\n", "        if False:\n",
        "tests/test_label.py::test_a_run_on_an_exported_model_is_private_for_nothing",
        "a report says that its ε holds a teacher's whole cost, which is not known",
    ),
    _one(
        "derived", "a-personal-model-of-another-column-opens", "fedtune/runs/personal.py",
        "    if about.patient != patient_column(site.data):\n        raise",
        "    if False:\n        raise",
        "tests/client/test_personalise.py::"
        "test_a_model_of_patients_by_another_column_opens_no_more",
        "a model goes on being used that was trained on a patient who withdrew",
    ),
    _one(
        "derived", "a-teachers-own-noise-is-forgotten", "fedtune/server/teacher.py",
        "        spent |= _with_shared_noise(site, total)\n", "",
        "tests/server/test_teacher.py::"
        "test_epsilon_by_a_sites_own_noise_alone_is_of_both_trainings",
        "a report says that less of the teacher's training counts if sites collude than does",
    ),
    _one(
        26, "the-teacher-is-centred-over-the-batch", "fedtune/core/objectives/distill.py",
        "    tokens, teacher_logp = batch.soft\n",
        "    tokens, teacher_logp = batch.soft\n"
        "    teacher_logp = torch.log_softmax(\n"
        "        teacher_logp - teacher_logp.mean(dim=0, keepdim=True), dim=2)\n",
        "tests/dp/test_distill.py::test_the_self_test_passes",
        "every target depends on whoever is in the batch",
    ),
    _one(
        26, "a-teacher-without-privacy-is-heard", "fedtune/core/vault/policy.py",
        "if spec.digest not in trusted:", "if False:",
        "tests/dp/test_distill.py::test_a_run_teaches_only_where_a_person_lists_its_digest",
        "a model that was fitted to the records sets their targets",
    ),
    _one(
        26, "a-plan-chooses-a-records-memory", "fedtune/core/objectives/distill.py",
        "2 <= self.top <= MOST_KEPT", "2 <= self.top",
        "tests/dp/test_distill.py::"
        "test_the_memory_of_a_records_targets_is_bounded_whatever_the_plan_says",
        "a site is killed for lack of memory before it charges, by the number of its tokens",
    ),
    _one(
        "students", "the-students-base-hears-the-teacher", "fedtune/derive/distill.py",
        "    rows = [prompt_ids(r.prompt, table, teacher.tokenizer) for r in prompts.records]\n",
        "    told, _ = complete_prompts(prompts.records, teacher, table, 2, 0)\n"
        "    asked = [r.prompt + r.completion for r in told]\n"
        "    rows = [prompt_ids(text, table, teacher.tokenizer) for text in asked]\n",
        "tests/test_distill.py::test_the_students_base_heard_no_teacher",
        "base/, which the report calls free of the teacher, follows from what it says",
    ),
    _one(
        "students", "the-teachers-adapter-without-its-scale", "fedtune/derive/distill.py",
        'value * (scale if "lora_B" in name else 1.0)', "value",
        "tests/test_distill.py::test_it_begins_where_its_teacher_stands",
        "the student begins somewhere else than its teacher stands",
    ),
    _one(
        "students", "the-first-gap-is-the-best", "fedtune/derive/depth_pruning.py",
        "if best is None or divergence < best.divergence:", "if best is None:",
        "tests/models/test_gap.py::test_layers_that_do_nothing_are_the_ones_left_out",
        "which layers go is not measured",
    ),
    _one(
        "students", "the-first-position-is-all-that-is-fitted", "fedtune/derive/depth_pruning.py",
        "    size = target.float().pow(2).mean(dim=1, keepdim=True)\n",
        "    size = torch.ones(len(x), 1)\n",
        "tests/models/test_gap.py::test_a_position_counts_by_its_own_size",
        "states a hundred times as large drown all others",
    ),
    _one(
        "max_kl", "a-policy-past-the-leash-is-kept", "fedtune/derive/improve.py",
        "if evaluation.kl > scores.max_kl:", "if False:",
        "tests/test_improve.py::test_past_max_kl_nothing_is_kept",
        "the policy goes as far as the reward takes it",
    ),
    _one(
        "max_kl", "the-price-of-the-kl-is-forgotten", "fedtune/derive/improve.py",
        "return self.reward - kl_coef * self.kl", "return self.reward",
        "tests/test_improve.py::"
        "test_what_is_kept_is_worth_most_by_reward_less_the_price_of_its_kl",
        "the policy that strays most is kept, and not what the training strives for",
    ),
    _one(
        "max_kl", "the-luckiest-look-is-reported", "fedtune/derive/improve.py",
        'b"what the report says"', 'b"which policy to keep"',
        "tests/test_improve.py::test_the_reward_rises_within_max_kl",
        "the best of several looks is told as what the policy does",
    ),
    _one(
        "parents", "a-teachers-teacher-is-forgotten", "fedtune/server/teacher.py",
        "if left_out := leaves_out(parent):", "if left_out := \"\":",
        "tests/server/test_teacher.py::test_a_cost_that_is_not_known_is_said_not_to_be",
        "a model's ε leaves out a teacher without privacy, two generations back",
    ),
    _one(
        "parents", "a-judge-may-have-had-any-teacher", "fedtune/derive/lineage.py",
        "elif left_out := leaves_out(run.report):", "elif left_out := \"\":",
        "tests/server/test_teacher.py::test_a_run_whose_teacher_is_not_paid_for_is_no_private_parent",
        "patients' records, without noise, decide each patient's preferences by a second teacher",
    ),
    _one(
        "parents", "a-card-forgets-a-teacher", "fedtune/report/declared.py",
        "lines = [teacher_left_out_line(report), free_query_line", "lines = [free_query_line",
        "tests/server/test_teacher.py::test_a_cost_that_is_not_known_is_said_not_to_be",
        "a model's card states ε, and not that its teacher was trained without privacy",
    ),
    _one(
        "parents", "a-dossier-forgets-a-teacher", "fedtune/evidence/dossier/content.py",
        "bool(teacher_left_out_line(found[\"report.json\"]))", "False",
        "tests/dossier/test_assurance.py::test_every_page_says_that_a_teachers_cost_is_left_out",
        "a signed dossier states ε, and not that the teacher was trained without privacy",
    ),
    _one(
        "parents", "a-merge-forgets-a-teacher", "fedtune/derive/lineage.py",
        "if report.get(\"private\") and (left_out := leaves_out(report)):", "if left_out := \"\":",
        "tests/server/test_teacher.py::test_a_run_whose_teacher_is_not_paid_for_is_no_private_parent",
        "a merged model's ε leaves out a teacher without privacy",
    ),
    _one(
        "parents", "a-merged-run-is-as-private-as-its-first-parent", "fedtune/derive/lineage.py",
        "elif not (run := Run(source)).private:", "elif not (run := Run(source)):",
        "tests/test_label.py::"
        "test_a_merged_run_with_a_parent_without_privacy_neither_writes_nor_judges",
        "other patients' records, without noise, decide each patient's preferences",
    ),
    _one(
        "parents", "one-parent-pays-for-all", "fedtune/derive/lineage.py",
        "privacy = composed_epsilon.compose_reports(list(reports.values()))",
        "privacy = next(iter(reports.values()))[\"privacy\"]",
        "tests/test_improve.py::test_the_reward_rises_within_max_kl",
        "what two runs spent on the same people is not added up",
    ),
    _one(
        "parents", "the-teachers-query-is-forgotten", "fedtune/server/teacher.py",
        'if selected := {*report.get("free_query", ()), *parent.get("free_query", ())}:',
        'if selected := {*report.get("free_query", ())}:',
        "tests/server/test_teacher.py"
        "::test_sites_whose_records_a_query_selected_for_the_teacher_are_named_by_the_student",
        "the ε of both trainings is claimed although it does not hold for the teacher's",
    ),
    _one(
        "parents", "the-entry-of-larger-epsilon-hides-the-other", BUDGETS,
        'worst | {"secure_aggregation": max(tables, key=_fallback_epsilon)}', "worst",
        T_BUDGETS + "test_stated_disjoint_is_the_larger_by_a_sites_own_noise_too",
        "an ε is said to hold whatever happens, and is of the run whose noise was not shared",
    ),
    _one(
        "parents", "held-out-patients-trust-the-other-sites", "fedtune/server/teacher.py",
        'site.get("fallback_epsilon", site["epsilon"])', 'site["epsilon"]',
        "tests/server/test_teacher.py"
        "::test_held_out_patients_are_told_what_they_pay_whatever_happens",
        "an ε that colluding sites make wrong stands beside one that they do not",
    ),
    _one(
        "parents", "the-students-teacher-was-free", "fedtune/server/teacher.py",
        "both = compose_reports([report, parent])", "both = compose_reports([report])",
        "tests/server/test_teacher.py::test_a_student_pays_for_its_teacher_too",
        "a student claims less than what its teacher and it spent on one person",
    ),
    _one(
        "label", "no-state-folder-nobody-withdrew", "fedtune/derive/label.py",
        "if (ledger := find_ledger(records.home)) is None:",
        "if not records.site.state.exists() or (ledger := find_ledger(records.home)) is None:",
        "tests/test_label.py::"
        "test_who_withdrew_from_a_hospital_is_left_out_at_each_membership",
        "who withdrew is read by a membership that has not trained yet",
    ),
    _one(
        "label", "the-judge-is-asked-in-one-order", LABEL,
        "return (self._odds(prompt, first, second) - self._odds(prompt, second, first)) / 2",
        "return self._odds(prompt, first, second)",
        "tests/test_label.py::test_what_a_place_is_worth_cancels",
        "a judge that likes the first answer labels by the order",
    ),
    _one(
        "label", "the-chat-starts-twice", LABEL,
        "text = text.removeprefix(tokenizer.bos_token)", "pass",
        "tests/test_label.py::test_a_base_that_was_tuned_to_chat_is_asked_in_its_own_chat",
        "the generator is asked in another way than the study trains",
    ),
)  # fmt: skip


MERGE_MUTANTS = (
    _one(
        "merge", "the-larger-where-the-data-was-the-same", BUDGETS,
        "for parent in sorted({site.parent for site in hospital}):",
        "for parent in [hospital[-1].parent]:",
        T_BUDGETS + "test_the_same_site_pays_for_both",
        "a merged adapter claims less than what was spent on one person",
    ),
    _one(
        "merge", "what-is-not-known-is-apart", BUDGETS,
        "return APART if first.names and first.keys and second.names and second.keys else UNKNOWN",
        "return APART",
        T_BUDGETS + "test_what_is_not_known_is_composed",
        "runs of which it is not known whether they share people count as disjoint",
    ),
    _one(
        "merge", "two-memberships-cost-the-larger", BUDGETS,
        "lambda first, second: bool(first.names & second.names)", "lambda *_: True",
        T_BUDGETS + "test_two_memberships_that_a_third_connects_are_one_hospital",
        "of a hospital that took part twice in one run, one part counts",
    ),
    _one(
        "merge", "what-connects-two-groups-joins-one", BUDGETS,
        "if any(is_same(site, other) for other in g)]",
        "if any(is_same(site, other) for other in g)][:1]",
        T_BUDGETS + "test_names_and_keys_are_followed_over_several_parents",
        "a hospital that changed its name and its keys counts as two",
    ),
    _one(
        "merge", "a-merged-adapter-forgets-other-keys", BUDGETS,
        "if len(names) > 1 or len(keys) > 1:", "if len(names) > 1:",
        T_BUDGETS + "test_a_merged_adapter_knows_each_key_that_a_hospital_had",
        "merged again, what a hospital spent with earlier keys is left out",
    ),
    _one(
        "merge", "two-names-of-one-report-count-twice", BUDGETS,
        "return frozenset(str(found) for found in [own, *more] if found)",
        "return frozenset(str(found) for found in [own] if found)",
        T_BUDGETS + "test_a_hospital_with_two_names_in_one_report_is_charged_once",
        "a merged adapter's cost is doubled",
    ),
    _one(
        "merge", "a-merged-parent-counts-once", BUDGETS,
        'for event in site["events"])', 'for event in site["events"][:1])',
        T_BUDGETS + "test_a_merged_adapter_may_be_merged_again",
        "the grandparents' other kinds of steps are forgotten",
    ),
    _one(
        "merge", "factors-are-added-apart", MERGE, '"linear": "cat"', '"linear": "linear"',
        T_MERGE + "test_linear_is_the_weighted_sum_of_the_updates[ranks0]",
        "cross terms between one run's A and another's B",
    ),
    _one(
        18, "outliers-of-the-whole-batch", "fedtune/core/bases/quantise.py",
        "OUTLIERS = 0.0", "OUTLIERS = 6.0",
        "tests/models/test_quantise.py::test_no_record_decides_how_anothers_numbers_are_rounded",
        "LLM.int8()'s own setting: one record decides how another is rounded",
    ),
    _one(
        "quantise", "the-plans-bits-are-forgotten", "fedtune/core/models/build.py",
        "dtype_of(study.base.dtype), study.base.quantisation", "dtype_of(study.base.dtype), None",
        "tests/models/test_quantise.py::test_weights_are_held_in_few_bits_and_the_head_is_not",
        "a plan that names 4 bits trains on another base",
    ),
    _one(
        "lora", "rank-stabilised-in-the-plan-alone", LORA,
        'use_rslora=lora.variant == "rslora"', "use_rslora=False",
        "tests/models/test_variants.py::test_rslora_is_a_scaling_and_the_oracles_pass",
        "merging and export scale by another number than training did",
    ),
    _one(
        "merge", "a-quantised-base-is-merged-whole", "fedtune/derive/merge_exported.py",
        "return load_plan(run).base.quantisation is not None", "return False",
        "tests/test_merging_whole.py::test_a_quantised_base_is_no_base_of_whole_models",
        "the errors of quantisation are added up as if they had been trained",
    ),
    _one(
        "export", "rotary-halves-stay-apart", "fedtune/derive/gguf.py",
        "tensor = interleave_rows(tensor, shared)", "pass",
        "tests/test_export.py::test_transformers_own_reader_gives_the_same_logits",
        "a file that loads and writes nonsense",
    ),
    _one(
        "export", "the-base-alone-is-exported", "fedtune/derive/export.py",
        "loaded.model.merge_and_unload()", "loaded.model.unload()",
        "tests/test_export.py::test_plain_transformers_gives_the_logits_of_base_and_adapter",
        "what was trained is left behind",
    ),
)  # fmt: skip


CONTINUOUS_MUTANTS = (
    _one(
        "late", "who-arrives-late-pays-nothing", "fedtune/core/ledger/account.py",
        "return spent.seq > arrival and arrival not in self.reserved[spent.seq].out",
        "return arrival < 3 and arrival not in self.reserved[spent.seq].out",
        T_ARRIVALS + "test_each_unit_bears_the_rounds_it_was_in",
        "only the first cohort is charged",
    ),
    _one(
        "late", "who-is-out-pays-all-the-same-and-never-ends", "fedtune/core/ledger/ledger.py",
        "if refused[cohort.entries]}", "if not cohort.arrival}",
        T_ARRIVALS + "test_each_unit_bears_the_rounds_it_was_in",
        "a cohort that the filter refuses is not left out",
    ),
    _one(
        "late", "the-spent-stay-in", SITE, "lambda key: arrival(key) in spent",
        "lambda key: arrival(key) in ()",
        T_COHORTS + "test_who_has_spent_everything_is_out_and_the_others_go_on",
        "the ledger leaves a cohort out and its records train on",
    ),
    _one(
        29, "rounds-begin-by-a-count", "fedtune/core/config/types.py",
        "if COUNTS.search(value):", "if False:",
        "tests/continuous/test_schedule.py::test_a_round_that_a_count_begins_is_refused",
        "a plan may begin a round whenever so many new records are there",
    ),
    _one(
        "release", "any-challenger-is-released", CONTINUOUS,
        'decision="released" if judged.verdict == "better" else "kept back",',
        'decision="released",',
        T_VERSIONS + "test_only_what_is_better_is_released", "a worse adapter is promoted",
    ),
    _one(
        "release", "a-rollback-does-not-hold", "fedtune/server/versions.py",
        "            if index.pinned:\n", "            if index.pinned and not index.versions:\n",
        T_VERSIONS + "test_a_rollback_holds_over_restarts_until_it_is_undone",
        "the next round releases again what a person took back",
    ),
    _one(
        "release", "the-link-before-the-index", "fedtune/server/versions.py",
        "self._write(index)\n            self._settle(index)\n            return version\n",
        "self._settle(index)\n            self._write(index)\n            return version\n",
        T_VERSIONS + "test_a_kill_loses_nothing_and_releases_nothing_else[the-index-before]",
        "killed in between, what is released is on no list",
    ),
    _one(
        "release", "each-look-has-all-of-alpha", "fedtune/core/config/study.py",
        "return self.alpha / self.looks", "return self.alpha",
        T_LOOKS + "test_without_a_true_gain_hardly_any_study_releases_a_version[30-alone]",
        "of sixteen looks one finds a gain that is none",
    ),
    _one(
        "release", "a-group-that-got-worse-holds-nothing-back", CHANGE_PLAN,
        "worse = [group.name for group in groups if group.p is not None and group.p > level]",
        "worse = list[str]()",
        T_LOOKS + "test_a_version_that_is_worse_in_one_group_is_held_back[30]",
        "a ward pays for the gain of all others",
    ),
    _one(
        "release", "a-group-is-taken-by-its-figure", PAIRED,
        "    beyond = BEYOND * level\n", "    return 0.0\n    beyond = BEYOND * level\n",
        T_LOOKS + "test_a_group_passes_at_its_margin_no_oftener_than_its_level[60-0.2]",
        "a figure above the margin passes, with whatever interval",
    ),
    _one(
        "release", "what-did-not-change-was-shown", PAIRED,
        "float(beta.ppf(1 - beyond, changed + 1, n - changed))", "max(changed / n, 1e-6)",
        T_LOOKS + "test_no_change_at_all_in_few_records_shows_nothing",
        "twenty records of which none got worse show that none would",
    ),
    _one(
        "release", "looks-start-anew-with-a-record-more", CHANGE_PLAN,
        "    family = _family(public, files)\n", "    family = {public}\n",
        T_LOOKS + "test_a_look_that_the_plan_does_not_have_is_not_taken",
        "a file that grows by a line is a fresh one every time",
    ),
    _one(
        "release", "files-without-end", CHANGE_PLAN,
        "if not taken and len(others) >= table.files:", "if len(others) > 10**6:",
        T_LOOKS + "test_what_taught_the_model_judges_no_version_and_files_are_as_many_as_planned",
        "each new file has an α of its own",
    ),
    _one(
        "release", "what-taught-the-model-judges-it", CHANGE_PLAN,
        "len(files.get(public, frozenset()) & {*apart})", "0",
        T_LOOKS + "test_what_taught_the_model_judges_no_version_and_files_are_as_many_as_planned",
        "records that were learnt decide what is released",
    ),
    _one(
        "release", "public-records-by-a-digest-of-anybodys", "fedtune/server/looks.py",
        'frozenset(hmac.digest(key, one.encode(), "sha256").hex()[:32] for one in digests)',
        "frozenset(digests)",
        T_LOOKS + "test_a_look_that_the_plan_does_not_have_is_not_taken",
        "whoever has the folder can try which records were in the file",
    ),
    _one(
        "evidence", "a-verdict-is-believed", VERDICTS,
        "            if not _same(version[name], value):\n", "            if value is version:\n",
        T_VERDICTS + "test_a_verdict_that_was_changed_is_caught_whoever_signs_it[edit_p]",
        "a verdict that was edited passes",
    ),
    _one(
        "evidence", "the-list-of-versions-may-say-otherwise", VERDICTS,
        'if name != "format"} != record:', 'if name != "format"} == {}:',
        T_VERDICTS + "test_the_running_studys_list_may_not_say_otherwise",
        "the list that is read is not the one that was signed",
    ),
    _one(
        "evidence", "a-choice-is-made-up", VERDICTS,
        'if choice["version"] not in self._released:', "if False:",
        T_VERDICTS + "test_a_verdict_that_was_changed_is_caught_whoever_signs_it[other_choice]",
        "a version that was never released is in use by somebody's choice",
    ),
)  # fmt: skip

MUTANTS = (*MADE_MUTANTS, *MERGE_MUTANTS, *CONTINUOUS_MUTANTS)
