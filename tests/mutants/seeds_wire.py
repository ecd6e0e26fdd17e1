"""Seeded bugs of the wire, its encodings and a site's processes."""

from __future__ import annotations

from tests.mutants.mutant import one as _one
from tests.mutants.places import (
    ANSWERS,
    BUDGET,
    CODEC,
    PART,
    POLICY,
    ROUNDS,
    SEALS,
    SITE,
    SITES,
    SUMMARY,
    T_CODEC,
    T_LIES,
    TEAM,
    TOKENS,
)

WIRE_MUTANTS = (
    _one(
        21, "the-reply-carries-a-loss", ANSWERS, 'fields |= {"header": "", "signature": ""}',
        'fields |= {"header": "", "signature": "", "loss": "0.0"}',
        "tests/server/test_apps.py::"
        "test_train_gives_update_status_and_step_log_and_nothing_else",
        "the reply has a field that nobody listed",
    ),
    _one(
        21, "an-errors-words-leave", ANSWERS, 'return "failed", FAILED',
        'return "failed", str(error)',
        "tests/server/test_apps.py::test_only_a_refusals_words_leave_the_site",
        "an exception quotes a record, and its words leave the site",
    ),
    _one(
        22, "the-size-is-counted", SITE,
        "return Admission(admitted, reason, self.site.site.name, self._size, lora_rank)",
        "n = next(iter(self._cached.values()))[1].dataset.n_units if self._cached else 0\n"
        "        return Admission(admitted, reason, self.site.site.name, n)",
        "tests/traps/test_trap_22_site_counts.py", "weighting by the true number of units",
    ),
    _one(
        22, "weights-even-where-equal-is-said", ROUNDS,
        'if self.table.weights == "declared" else 1', 'if self.table.weights != "none" else 1',
        "tests/traps/test_trap_22_weights.py", "a larger site counts more than the plan says",
    ),
    _one(
        25, "choice-of-sites-as-amplification", SUMMARY,
        "name: _epsilon(events, parts, privacy, shares)",
        'name: _epsilon([e | {"q": e["q"] * progress.study.strategy.fraction} for e in events], '
        "parts, privacy, shares)",
        "tests/traps/test_trap_22_weights.py", "the coordinator's draw is public",
    ),
    _one(
        23, "records-where-there-are-patients", POLICY,
        'if study.unit == "record" and any(table.columns.patient for table in tables):',
        "if False:",
        "tests/traps/test_trap_12_peft_options.py::"
        "test_records_are_not_enough_where_there_are_patients",
        "ε of a record read as a patient's",
    ),
    _one(
        "cap", "the-cap-follows-the-file's-order", TOKENS,
        "(not is_kept(one.record), hashlib.sha256(content_of(one.record)).hexdigest(), index)",
        "(False, '', index)",
        "tests/data/test_data_units.py::test_the_cap_depends_on_the_patients_own_records_alone",
        "which records are kept depends on others",
    ),
    _one(
        29, "too-few-units-is-a-failure", SITE, "        if dataset.n_units < 2:\n",
        "        if dataset.n_units < 2:\n"
        '            raise DataError("too few usable records")\n',
        "tests/traps/test_trap_22_site_counts.py", "a lone patient takes no part",
    ),
)  # fmt: skip


ENCODING_MUTANTS = (
    _one(
        "wire", "cut-off-not-rounded", CODEC, "np.rint(codes, ", "np.trunc(codes, ",
        T_CODEC + "test_every_number_comes_back_within_the_stated_error",
        "twice the stated error, and always towards zero",
    ),
    _one(
        "wire", "the-message-says-how-many-blocks", CODEC,
        "if scales.shape != starts.shape:",
        "scales = np.resize(scales, starts.shape)\n    if False:",
        T_CODEC + "test_what_is_no_encoding_is_refused",
        "scales of other blocks, or of none",
    ),
    _one(
        "wire", "tensors-end-to-end-in-no-order", CODEC,
        "    for name, shape in sorted(agreed.items()):\n        tensors[name]",
        "    for name, shape in agreed.items():\n        tensors[name]",
        T_CODEC + "test_each_tensor_gets_its_own_numbers_back",
        "one tensor's numbers are another's",
    ),
    _one(
        "wire", "the-bound-counts-from-nothing", "fedtune/server/bound.py",
        "norm_bound(self._study, site, dimension, start)",
        "norm_bound(self._study, site, dimension, 0.0)",
        "tests/server/test_wire.py::"
        "test_the_bound_on_an_update_counts_from_the_adapter_that_was_sent",
        "honest sites are dropped where weights decay",
    ),
    _one(
        "wire", "what-waited-is-sent-whatever-its-form", SITE,
        "            check_waiting_update(prepared, round_, payload)", "            pass",
        "tests/test_lora_ranks_plans.py::test_a_site_declares_its_rank_and_keeps_it_for_the_study",
        "another rank's update under this one's name",
    ),
    _one(
        "wire", "any-scale-will-do", CODEC,
        "if not (np.isfinite(scales) & (scales > 0)).all():", "if False:",
        T_CODEC + "test_what_is_not_finite_stays_so_and_is_refused",
        "a diverged update looks like numbers",
    ),
    _one(
        "wire", "any-encoding-will-do", "fedtune/server/admission.py",
        "    check_agreed(arrays, codec.layout(agreed, encoding))\n", "",
        T_LIES + "test_a_lie_is_dropped_with_its_own_reason",
        "arrays are read before they are compared with the plan",
    ),
    _one(
        "wire", "rounding-is-a-reason-to-drop", "fedtune/server/admission.py",
        "longest * codec.GROWTH[encoding]", "longest",
        T_LIES + "test_rounding_is_no_reason_to_drop_an_honest_update",
        "honest sites are dropped where noise is large",
    ),
    _one(
        "wire", "the-adapter-is-kept-as-it-was-sent", ROUNDS,
        "adapter = preconditioner.step_adapter("
        "self.strategy.apply, progress.adapter, progress.frozen)",
        "adapter = codec.decode(codec.encode(\n"
        "            self.strategy.apply(progress.adapter), self.study.wire.adapter),\n"
        "            codec.shapes(progress.adapter))",
        "tests/server/test_wire.py::test_rounding_does_not_add_up_over_rounds",
        "updates below half a unit of the rounded adapter are lost, round after round",
    ),
    _one(
        "wire", "rounded-before-the-ledger-but-sent-whole", SITE,
        "sent = encode(delta, study.wire.update)", "sent = encode(delta, \"float32\")",
        SITES + "test_an_admitted_plan_trains_and_every_step_is_in_the_log",
        "the outbox holds other bytes than the plan says",
    ),
    _one(
        "wire", "a-part-sent-twice-ends-the-upload", "fedtune/flower/api.py",
        "return PushObjectResponse(stored=True) if repeated else answer", "return answer",
        "tests/flower/test_upload.py::test_a_part_is_sent_until_it_has_arrived",
        "one lost answer, and the whole update is sent again three minutes later",
    ),
)  # fmt: skip


GUARANTEE_MUTANTS = (
    _one(
        "filter", "the-order-follows-the-plan", BUDGET,
        "return own[0].order if own else best_order", "return best_order",
        "tests/dp/test_budget.py::"
        "test_the_order_of_the_first_charge_stays_when_the_ceiling_is_changed",
        "the filter's order is chosen after results were seen",
    ),
    _one(
        "filter", "a-plan-chooses-the-order", BUDGET,
        "if own else best_order(self.policy.ceiling, self.policy.delta)",
        "if own else best_order(self.policy.ceiling, self.policy.delta) + self.plan.sampling_rate",
        "tests/dp/test_budget.py::test_the_order_follows_from_the_policy_and_never_from_a_plan",
        "a plan of almost no ε makes every later study expensive",
    ),
    _one(
        "filter", "another-membership-fixes-the-order", BUDGET,
        "own = self.share.charges", "own = self.charges",
        "tests/dp/test_budget.py::"
        "test_a_changed_ceiling_does_not_show_that_another_membership_paid_before",
        "a membership tells from its own ε that another one paid before",
    ),
    _one(
        "filter", "both-filters-get-all-of-delta", "fedtune/core/dp/filter.py",
        "if samples_first else (delta, delta)", "if samples_first is None else (delta, delta)",
        "tests/dp/test_ceiling.py::test_a_sampled_step_costs_no_more_than_if_it_did_not_sample",
        "where the first step sampled, three filters at δ are called 2 δ",
    ),
    _one(
        "ledger", "an-adopted-ledger-began-unsampled", "fedtune/core/ledger/entries.py",
        "and (charge.adopted or not first)", "and not first",
        "tests/dp/test_budget.py::"
        "test_a_ledger_that_was_adopted_is_held_at_the_order_that_it_had_fixed",
        "a ledger that began with a sampled study is taken for one that did not",
    ),
    _one(
        "filter", "several-kinds-as-if-planned-at-once", "fedtune/core/dp/filter.py",
        "if kinds_known and len({event._replace(steps=0) for event in events}) <= 1:", "if events:",
        "tests/dp/test_ceiling.py::"
        "test_two_kinds_are_filtered_at_the_order_given_and_cost_no_less_than_pld",
        "studies chosen after results are added up as if all had been planned",
    ),
    _one(
        "filter", "sampled-steps-as-gaussians", "fedtune/core/dp/filter.py",
        "if all(event.sampling_rate == 1 for", "if any(event.sampling_rate == 1 for",
        "tests/dp/test_ceiling.py::test_several_kinds_that_take_every_unit_are_one_gaussian",
        "the exact filter is used where it is proven for none",
    ),
    _one(
        "filter", "a-long-integral-is-half-its-bound", "fedtune/core/dp/filter.py",
        "return order * (records / sigma) ** 2 / 2", "return order * (records / sigma) ** 2 / 4",
        "tests/dp/test_filter.py::test_a_long_integral_is_bounded_from_above",
        "a plan whose integral takes long costs less than it reveals",
    ),
    _one(
        "ledger", "a-round-is-trained-again", "fedtune/core/ledger/ledger.py",
        "        if (sha256 := self._account.sent.get(slot)) is None:", "        if True:",
        SITES + "test_a_round_asked_for_again_is_sent_again_and_not_paid_again",
        "a retry trains again",
    ),
    _one(
        "seal", "a-token-of-any-type", "fedtune/core/wire/seal.py",
        "return isinstance(token, str) and TOKEN.fullmatch(token) is not None", "return True",
        "tests/wire/test_hostile.py::test_a_ledgers_statement_that_is_no_token_is_dropped",
        "a token of nested lists makes the file of all receipts unreadable",
    ),
    _one(
        "seal", "any-signature-will-do", "fedtune/core/wire/seal.py",
        "if not verifies(public, signed, signature):",
        "if not verifies(public, signed, signature) and not signature:",
        SEALS + "test_an_update_signed_by_another_or_altered_is_dropped",
        "an update that somebody else signed is counted",
    ),
    _one(
        "query", "the-count-is-not-clipped", "fedtune/core/config/study.py",
        "return math.sqrt(2 * (1 + len(self.query_axes)))", "return 1.0",
        "tests/test_private_evaluation.py::"
        "test_epsilon_of_the_queries_is_the_accountants_of_the_step_log",
        "a query's sensitivity is another than the ledger pays for",
    ),
    _one(
        "query", "whoever-asks-is-answered", "fedtune/core/vault/evaluation.py",
        'if "evaluation" not in site.policy.release:', "if False:",
        "tests/test_private_evaluation.py::"
        "test_a_site_that_does_not_release_refuses_by_name_of_the_rule",
        "private evaluation without the policy's leave",
    ),
)  # fmt: skip


TEAM_MUTANTS = (
    _one(
        17, "noise-on-every-rank", TEAM, PART,
        PART + "        from fedtune.core.dp import noise\n\n"
        "        counted_sum[:dimension] += noise.gaussian_on_grid(dimension, 1.7, 2.0**-20)\n",
        "tests/dp/test_team.py::test_noise_is_added_once_whatever_the_number_of_ranks",
        "the variance grows with the number of processes",
    ),
    _one(
        8, "a-rank-drops-a-row", TEAM, "partial = clipped_sum(sampled[share])",
        "partial = clipped_sum(sampled[share][1:])",
        "tests/dp/test_team.py::test_the_sum_is_that_of_one_process_bit_for_bit",
        "each rank rounds its share down",
    ),
)  # fmt: skip

MUTANTS = (*WIRE_MUTANTS, *ENCODING_MUTANTS, *GUARANTEE_MUTANTS, *TEAM_MUTANTS)
