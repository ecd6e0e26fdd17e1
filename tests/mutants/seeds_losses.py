"""Seeded bugs of losses and per-record gradients."""

from __future__ import annotations

from tests.mutants.mutant import one as _one
from tests.mutants.places import (
    CACHE,
    CAUSAL,
    CLASSIFY,
    CLIP,
    GRADIENTS,
    GUARD,
    MEAN,
    ONE_PASS,
    OPACUS,
    RAISE,
    T_CONTRACT,
    T_GRADIENTS,
    T_ISOLATION,
    T_LAYERS,
    T_ORACLES,
    T_PARITY,
    T_PLAN,
    T_POST,
    T_REFERENCE,
    T_ROWS,
    TRAINING,
)

T_STATISTICS = "tests/test_prototypes.py::"
STATISTICS = "fedtune/core/models/class_statistics.py"

LOSS_MUTANTS = (
    _one(
        "statistics", "features-are-not-bounded", STATISTICS,
        "(features / length.clamp_min(1.0)).float()", "features.float()",
        T_STATISTICS + "test_no_basis_and_no_vector_makes_statistics_longer_than_the_bound",
        "a record's class sums are as long as the coordinator's basis makes them",
    ),
    _one(
        "statistics", "what-is-not-finite-counts", STATISTICS,
        "count_weight * is_finite.float()", "count_weight * torch.ones_like(is_finite.float())",
        T_STATISTICS + "test_no_basis_and_no_vector_makes_statistics_longer_than_the_bound",
        "a record whose vector is not finite counts, where others like it do not",
    ),
    _one(
        "statistics", "a-basis-is-loaded-unread", STATISTICS,
        "if not (np.isfinite(array).all() and np.abs(array).max(initial=0.0) <= LARGEST):",
        "if False:",
        T_STATISTICS + "test_a_hostile_basis_is_refused_before_a_record_is_read",
        "a basis that is not finite makes every record's statistics zero, paid for",
    ),
    _one(
        "statistics", "any-basis-is-the-plans", "fedtune/core/models/network.py",
        "if expected not in (None, lora_module.digest(received)):", "if False:",
        T_STATISTICS + "test_a_hostile_basis_is_refused_before_a_record_is_read",
        "a site trains in another basis than the plan that its people signed",
    ),
    _one(
        1, "loss-averages-over-the-batch", CAUSAL, MEAN,
        "found = likelihood(network, batch)\n"
        "        return -found.total / found.targets.sum().clamp_min(1) * len(batch.label)",
        f"{T_PARITY} {T_ISOLATION}", "the built-in loss of a language model",
    ),
    _one(
        18, "batch-norm-on-hidden-states", "fedtune/core/objectives/_tokens.py",
        "hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states)",
        "hidden = network.hidden(batch.prefix, batch.mask, keep, batch.tower_states)\n"
        "    hidden = hidden - hidden.mean(dim=0, keepdim=True)",
        f"{T_PARITY} {T_ISOLATION}", "statistics over the records of a batch",
    ),
    _one(
        18, "batch-norm-on-pooled-vectors", CLASSIFY,
        "logits = network.logits(network.pool(hidden, batch.mask))",
        "pooled = network.pool(hidden, batch.mask)\n"
        "        logits = network.logits((pooled - pooled.mean(0)) / (pooled.std(0) + 1e-6))",
        T_ROWS + "test_a_classifiers_rows_are_their_own",
        "a classifier's vectors are normalised over the records of a batch",
    ),
    _one(
        26, "weights-from-a-model-of-the-batch", CAUSAL, MEAN,
        "own = -likelihood(network, batch).mean\n"
        "        teacher = torch.softmax(-own.detach(), dim=0)\n"
        "        return own * teacher * len(own)",
        f"{T_PARITY} {T_ISOLATION}", "a record's weight follows from the losses of the whole batch",
    ),
    _one(
        27, "loss-minus-the-batch-mean", CAUSAL, MEAN,
        "own = -likelihood(network, batch).mean\n"
        "        return (own - own.mean()) ** 2",
        f"{T_PARITY} {T_ISOLATION}",
        "the batch's mean loss is subtracted from each record's, as in a group-normalised "
        "advantage",
    ),
    _one(
        27, "rewards-centred-over-the-batch", CLASSIFY,
        "return functional.cross_entropy(logits,",
        "return functional.cross_entropy(logits - logits.mean(dim=0),",
        T_ROWS + "test_a_classifiers_rows_are_their_own", "reward centring",
    ),
)  # fmt: skip


PREFERENCE_MUTANTS = (
    _one(
        27, "reference-point-from-the-batch", "fedtune/core/objectives/kto.py",
        "gain = self.beta * (ratio - self.reference_point)",
        "gain = self.beta * (ratio - ratio.detach().mean().clamp(min=0))",
        T_ORACLES + "[kto-auto-patient]", "KTO as it is usually run",
    ),
    _one(
        27, "rewards-of-pairs-centred-over-the-batch", "fedtune/core/objectives/reward.py",
        "self.centring * (better + worse) ** 2", "0.1 * (better + worse).mean() ** 2",
        T_CONTRACT + "test_a_loss_is_the_same_in_any_company_and_at_any_time",
        "one mean for every pair",
    ),
    _one(
        26, "the-reference-has-the-adapter-on", "fedtune/core/objectives/_tokens.py",
        "with torch.no_grad(), network.base_only():", "with torch.no_grad():",
        T_REFERENCE + "test_the_reference_is_the_policy_at_the_start",
        "the reference is a model that saw the records",
    ),
    _one(
        26, "a-reference-kept-by-place-in-the-batch", "fedtune/core/objectives/_tokens.py",
        "batch.reference_logps[batch.index] = logps",
        "batch.reference_logps[: len(batch.index)] = logps",
        T_REFERENCE + "test_the_reference_is_computed_once_and_stays_each_records_own",
        "a record's reference is another record's",
    ),
    _one(
        28, "one-passage-of-a-pair-counts", GRADIENTS,
        "per_passage.sum(dim=1).flatten(1)", "per_passage[:, 0].flatten(1)",
        T_ORACLES + "[dpo-auto-patient]", "the worse answer's gradient is dropped",
    ),
    _one(
        28, "passages-are-clipped-apart", GRADIENTS,
        "per_passage.sum(dim=1).flatten(1)",
        "(per_passage / (per_passage.flatten(2).norm(dim=2)[(...,) + (None,) * "
        "(per_passage.dim() - 2)]"
        " + 1e-9)).sum(dim=1).flatten(1)",
        T_ORACLES + "[dpo-auto-patient]", "a pair moves the sum by two bounds",
    ),
    _one(
        14, "a-score-leaves-out-the-last-token", "fedtune/core/data/tokenize.py",
        "if scored or not hits.any():", "if not hits.any():",
        "tests/objectives/test_runs.py::test_a_score_is_read_off_the_last_token",
        "a reward model that does not read what it scores to the end",
    ),
    _one(
        27, "a-tiny-base-too-small-to-tell", "fedtune/core/models/tiny.py",
        '"initializer_range": HIDDEN**-0.5,', '"initializer_range": 0.02,',
        T_CONTRACT + "test_a_loss_that_couples_records_is_caught[kto]",
        "the self-test passes a loss that couples records",
    ),
)  # fmt: skip


GRADIENT_MUTANTS = (
    _one(
        7, "gradients-stay-on-the-model", OPACUS, "            watcher.cleanup()\n", "",
        T_GRADIENTS + "test_nothing_un_noised_stays_on_the_model", "hooks and grad_sample stay",
    ),
    _one(
        7, "the-pass-stays-on-the-model", ONE_PASS,
        "                del module.forward\n", "                pass\n",
        T_GRADIENTS + "test_nothing_un_noised_stays_on_the_model",
        "a layer goes on collecting gradients",
    ),
    _one(
        7, "gradients-are-not-zeroed", CLIP, "        chunk.wipe()\n", "        pass\n",
        T_PLAN + "test_gradients_are_wiped", "freed but still in memory",
    ),
    _one(
        11, "missing-gradient-from-the-batch", OPACUS,
        "            gradients.append(gradient",
        "            if gradient is None and parameter.grad is not None and gradients:\n"
        "                gradient = parameter.grad.clone().expand(\n"
        "                    len(gradients[-1]), *parameter.shape)\n"
        "            gradients.append(gradient",
        T_LAYERS, "a checkpointed layer falls back to the batch's gradient",
    ),
    _one(
        13, "first-dimension-of-one-broadcasts", GRADIENTS, GUARD,
        "            if gradient is None or gradient.shape[0] not in (1, n_records):\n",
        T_LAYERS, "GPT-2's position embedding",
    ),
    _one(
        16, "missing-gradient-is-zero", GRADIENTS, RAISE,
        "gradient = torch.zeros(len(batch.index), *parameter.shape)",
        T_GRADIENTS + "test_a_missing_gradient_is_an_error", "a layer is passed over in silence",
    ),
    _one(
        28, "one-tile-of-a-record-counts", GRADIENTS, GUARD,
        "            if gradient is not None and gradient.shape[0] > len(batch.index):\n"
        "                gradient = gradient[: len(batch.index)]\n" + GUARD,
        T_LAYERS, "the first dimension is records x tiles",
    ),
    _one(
        33, "what-a-failure-left-on-a-layer-stays", OPACUS,
        "                    delattr(part, name)\n", "                    pass\n",
        "tests/dp/test_errors.py::test_a_record_that_raises_costs_its_own_unit",
        "one row that ran out of memory sizes the blocks of all later ones",
    ),
    _one(
        33, "a-round-stops-at-a-row-without-gradient", GRADIENTS,
        "raises: tuple[type[Exception], ...] = ()",
        "raises: tuple[type[Exception], ...] = (NoRowGradient,)",
        "tests/dp/test_errors.py::"
        "test_what_the_layers_decide_is_an_error_of_checks_and_of_no_round",
        "one row without a gradient ends the round for all",
    ),
    _one(
        19, "dropout-in-training-mode", OPACUS,
        "            if any(p.requires_grad for p in module.parameters(recurse=False)):\n"
        "                module.train()\n",
        "            module.train()\n",
        T_ROWS + "test_no_dropout_mask_is_drawn", "the base's own dropout masks",
    ),
    _one(
        11, "a-layer-used-twice-counts-once", ONE_PASS, "            previous += gradients\n", "",
        "tests/dp/test_engines.py::test_a_layer_used_twice_adds_up",
        "the gradient of its second use is left out",
    ),
    _one(
        1, "one-gradient-for-the-batch", ONE_PASS,
        "return torch.bmm(left.transpose(1, 2), right)",
        "return torch.bmm(left.transpose(1, 2), right).mean(0, keepdim=True).repeat("
        "len(left), 1, 1)",
        f"{T_PARITY} {T_ISOLATION}", "every record gets the batch's mean",
    ),
    _one(
        13, "scaling-is-left-out", ONE_PASS, "functional.linear(x.to(a.dtype), a).mul_(scaling)",
        "functional.linear(x.to(a.dtype), a)",
        "tests/dp/test_engines.py", "gradients of another adapter than the one that is trained",
    ),
    _one(
        19, "pad-to-the-longest", CACHE,
        "length = padded_length(max(len(self._positions[row]) for row in rows))",
        "length = padded_length(max(map(len, self._positions)))",
        T_ROWS + "test_padding_is_a_records_own", "numerics depend on who else is drawn",
    ),
    _one(
        23, "records-clipped-as-patients", TRAINING,
        "sampling_unit=study.sampling_unit", 'sampling_unit="record"',
        T_POST + "test_the_update_depends_on_the_noised_sums_alone", "sensitivity kC, charged as C",
    ),
)  # fmt: skip

MUTANTS = (*LOSS_MUTANTS, *PREFERENCE_MUTANTS, *GRADIENT_MUTANTS)
