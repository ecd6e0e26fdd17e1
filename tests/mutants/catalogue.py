"""The seeded bugs: what is changed in which shipped file, and the tests that must fail for it.

Every numbered trap has at least one. Where a trap cannot exist here by design (there is no
BatchMemoryManager, no GDP accountant, no set_seed), the mutant brings it in.

Areas that grew later have a module of their own, `seeds_AREA.py`, each with its MUTANTS."""

from __future__ import annotations

import importlib
import pkgutil

import tests.mutants
from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one

CLIP, NOISE, SAMPLING = "fedtune/dp/clip.py", "fedtune/dp/noise.py", "fedtune/dp/sampling.py"
PLAN, GRADIENTS = "fedtune/dp/plan.py", "fedtune/training/unit_gradients.py"
OPACUS, ONE_PASS = "fedtune/training/engines/opacus.py", "fedtune/training/engines/one_pass.py"
ACCOUNTANT, STEPLOG = "fedtune/dp/accountant.py", "fedtune/dp/steplog.py"
TOKENS, CACHE, LORA = "fedtune/data/load.py", "fedtune/models/cache.py", "fedtune/models/lora.py"
NETWORK, TRAINING = "fedtune/models/network.py", "fedtune/training/local_round.py"
STATES = "fedtune/models/prefix_store.py"
CAUSAL, CLASSIFY = "fedtune/objectives/causal_lm.py", "fedtune/objectives/classify.py"
SITE, POLICY, ANSWERS = (
    "fedtune/client/site.py",
    "fedtune/client/policy.py",
    "fedtune/client/answers.py",
)
ROUNDS, SUMMARY = "fedtune/server/rounds.py", "fedtune/server/summary.py"

T_CLIP, T_NOISE, T_SAMPLING = (f"tests/dp/test_{x}.py::" for x in ("clip", "noise", "sampling"))
T_PLAN, T_GRADIENTS = "tests/dp/test_plan.py::", "tests/dp/test_gradients.py::"
T_LAYERS = "tests/traps/test_trap_11_layers.py"
T_PARITY = T_GRADIENTS + "test_parity_with_micro_batches_of_one"
T_ISOLATION = T_GRADIENTS + "test_row_isolation"
T_ROWS = "tests/traps/test_trap_18_classify.py::"
T_POST = "tests/traps/test_trap_20_post_processing.py::"
T_ACCOUNTANT = "tests/dp/test_accountant.py::"
T_STATES = "tests/models/test_states.py::"
T_NETWORK = "tests/models/test_network.py::"
T_CHUNKS = T_PLAN + "test_noise_is_added_once_and_divided_by_the_plan"

MEAN = "return -likelihood(network, batch).mean"
GUARD = "            if each is None or each.shape[0] not in known:\n"
RAISE = 'raise ModelError("a trainable layer gave no per-record gradient")'
DONE = "        return self._add_noise(total, log, round_)\n"
DRAW = "noise.gaussian_on_grid(len(total), self.noise_multiplier * bound, grid)"
BOUND = "total, chunk, self.grid, self.max_grad_norm, self.clipping, self.gamma"
TOTAL = "        total = torch.zeros(dimension, dtype=torch.int64)\n"
SEEN = "            seen += chunk.rows\n"
POISSON = "sampled = sampling.poisson(n_rows, self.sampling_rate)"
STREAM = "yield np.frombuffer(encryptor.update(bytes(8 * size)), dtype=np.uint64)"
URANDOM = "np.frombuffer(os.urandom(8 * n_units), dtype=np.uint64)"
CHOSEN = "np.flatnonzero(draws < np.uint64(int(sampling_rate * 2.0**53))).tolist()"
NORMS = "squares += torch.linalg.vector_norm(block, dim=1).square_()"
REPORTED = "return float(_composed(events).get_epsilon_for_delta(delta))"
CALIBRATED = "    return found / 1000"
FIRST_FIELD = "                study=self.study,\n"

GDP = """if not events:
        return 0.0
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(sum(n * (q * k) ** 2 * math.expm1(1 / s**2) for s, q, n, k in events))

    def gap(e: float) -> float:
        above = norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)
        return float(above - delta)

    return float(brentq(gap, 0, 200)) if gap(0) > 0 else 0.0"""

LOSS_MUTANTS = (
    _one(
        1, "loss-averages-over-the-batch", CAUSAL, MEAN,
        "found = likelihood(network, batch)\n"
        "        return -found.total / found.targets.sum().clamp_min(1) * len(batch.label)",
        f"{T_PARITY} {T_ISOLATION}", "the built-in loss of a language model",
    ),
    _one(
        18, "batch-norm-on-hidden-states", "fedtune/objectives/_tokens.py",
        "hidden = network.hidden(batch.prefix, batch.mask, keep, batch.seen)",
        "hidden = network.hidden(batch.prefix, batch.mask, keep, batch.seen)\n"
        "    hidden = hidden - hidden.mean(dim=0, keepdim=True)",
        f"{T_PARITY} {T_ISOLATION}", "statistics over the records of a batch",
    ),
    _one(
        18, "batch-norm-on-pooled-vectors", CLASSIFY,
        "logits = network.logits(network.pool(hidden, batch.mask))",
        "pooled = network.pool(hidden, batch.mask)\n"
        "        logits = network.logits((pooled - pooled.mean(0)) / (pooled.std(0) + 1e-6))",
        T_ROWS + "test_a_classifiers_rows_are_their_own", "the same in the classifier",
    ),
    _one(
        26, "weights-from-a-model-of-the-batch", CAUSAL, MEAN,
        "own = -likelihood(network, batch).mean\n"
        "        teacher = torch.softmax(-own.detach(), dim=0)\n"
        "        return own * teacher * len(own)",
        f"{T_PARITY} {T_ISOLATION}", "a judge fitted to the same records",
    ),
    _one(
        27, "loss-minus-the-batch-mean", CAUSAL, MEAN,
        "own = -likelihood(network, batch).mean\n"
        "        return (own - own.mean()) ** 2",
        f"{T_PARITY} {T_ISOLATION}", "a group-normalised advantage",
    ),
    _one(
        27, "rewards-centred-over-the-batch", CLASSIFY,
        "return functional.cross_entropy(logits,",
        "return functional.cross_entropy(logits - logits.mean(dim=0),",
        T_ROWS + "test_a_classifiers_rows_are_their_own", "reward centring",
    ),
)  # fmt: skip

T_CONTRACT = "tests/objectives/test_contract.py::"
T_REFERENCE = "tests/objectives/test_reference.py::"
T_ORACLES = T_CONTRACT + "test_the_four_oracles_pass"

PREFERENCE_MUTANTS = (
    _one(
        27, "reference-point-from-the-batch", "fedtune/objectives/kto.py",
        "gain = self.beta * (ratio - self.reference_point)",
        "gain = self.beta * (ratio - ratio.detach().mean().clamp(min=0))",
        T_ORACLES + "[kto-auto-patient]", "KTO as it is usually run",
    ),
    _one(
        27, "rewards-of-pairs-centred-over-the-batch", "fedtune/objectives/reward.py",
        "self.centring * (better + worse) ** 2", "0.1 * (better + worse).mean() ** 2",
        T_CONTRACT + "test_a_loss_is_the_same_in_any_company_and_at_any_time",
        "one mean for every pair",
    ),
    _one(
        26, "the-reference-has-the-adapter-on", "fedtune/objectives/_tokens.py",
        "with torch.no_grad(), network.base_only():", "with torch.no_grad():",
        T_REFERENCE + "test_the_reference_is_the_policy_at_the_start",
        "the reference is a model that saw the records",
    ),
    _one(
        26, "a-reference-kept-by-place-in-the-batch", "fedtune/objectives/_tokens.py",
        "batch.before[batch.index] = found", "batch.before[: len(batch.index)] = found",
        T_REFERENCE + "test_the_reference_is_computed_once_and_stays_each_records_own",
        "a record's reference is another record's",
    ),
    _one(
        28, "one-passage-of-a-pair-counts", GRADIENTS,
        "parts.sum(dim=1).flatten(1)", "parts[:, 0].flatten(1)",
        T_ORACLES + "[dpo-auto-patient]", "the worse answer's gradient is dropped",
    ),
    _one(
        28, "passages-are-clipped-apart", GRADIENTS,
        "parts.sum(dim=1).flatten(1)",
        "(parts / (parts.flatten(2).norm(dim=2)[(...,) + (None,) * (parts.dim() - 2)]"
        " + 1e-9)).sum(dim=1).flatten(1)",
        T_ORACLES + "[dpo-auto-patient]", "a pair moves the sum by two bounds",
    ),
    _one(
        18, "a-score-leaves-out-the-last-token", "fedtune/data/tokenize.py",
        "if scored or not hits.any():", "if not hits.any():",
        "tests/objectives/test_runs.py::test_a_score_is_read_off_the_last_token",
        "a reward model that does not read what it scores to the end",
    ),
    _one(
        27, "a-tiny-base-too-small-to-tell", "fedtune/models/tiny.py",
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
        T_GRADIENTS + "test_nothing_un_noised_stays_on_the_model", "a layer goes on handing out",
    ),
    _one(
        7, "gradients-are-not-zeroed", CLIP, "        chunk.wipe()\n", "        pass\n",
        T_PLAN + "test_gradients_are_wiped", "freed but still in memory",
    ),
    _one(
        11, "missing-gradient-from-the-batch", OPACUS,
        "            found.append(each.detach() if isinstance(each, torch.Tensor) else None)\n",
        "            if each is None and parameter.grad is not None and found:\n"
        "                each = parameter.grad.clone().expand(len(found[-1]), *parameter.shape)\n"
        "            found.append(each.detach() if isinstance(each, torch.Tensor) else None)\n",
        T_LAYERS, "a checkpointed layer falls back to the batch's gradient",
    ),
    _one(
        13, "first-dimension-of-one-broadcasts", GRADIENTS, GUARD,
        "            if each is None or each.shape[0] not in (1, records):\n",
        T_LAYERS, "GPT-2's position embedding",
    ),
    _one(
        16, "missing-gradient-is-zero", GRADIENTS, RAISE,
        "each = torch.zeros(len(batch.index), *parameter.shape)",
        T_GRADIENTS + "test_a_missing_gradient_is_an_error", "a layer is passed over in silence",
    ),
    _one(
        28, "one-tile-of-a-record-counts", GRADIENTS, GUARD,
        "            if each is not None and each.shape[0] > len(batch.index):\n"
        "                each = each[: len(batch.index)]\n" + GUARD,
        T_LAYERS, "the first dimension is records x tiles",
    ),
    _one(
        19, "dropout-in-training-mode", OPACUS,
        "            if any(p.requires_grad for p in module.parameters(recurse=False)):\n"
        "                module.train()\n",
        "            module.train()\n",
        T_ROWS + "test_no_dropout_mask_is_drawn", "the base's own dropout masks",
    ),
    _one(
        11, "a-layer-used-twice-counts-once", ONE_PASS, "            known += each\n", "",
        "tests/dp/test_engines.py::test_a_layer_used_twice_adds_up", "the rest of it is unclipped",
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
        "length = padded_length(max(len(self._kept[at]) for at in rows))",
        "length = padded_length(max(map(len, self._kept)))",
        T_ROWS + "test_padding_is_a_records_own", "numerics depend on who else is drawn",
    ),
    _one(
        23, "records-clipped-as-patients", TRAINING, "by=study.drawn", 'by="record"',
        T_POST + "test_the_update_depends_on_the_noised_sums_alone", "sensitivity kC, charged as C",
    ),
)  # fmt: skip

CLIP_MUTANTS = (
    _one(
        4, "nan-passes-the-clip", CLIP, "usable = torch.isfinite(norms)",
        "usable = torch.ones_like(norms, dtype=torch.bool)",
        T_CLIP + "test_a_non_finite_unit_contributes_zero", "min(1, C/nan) is 1",
    ),
    _one(
        15, "the-first-layers-norm", CLIP, "scale = scales(chunk.parts, max_grad_norm,",
        "scale = scales(chunk.parts[:1], max_grad_norm,",
        "tests/dp/test_sensitivity.py::test_crafted_pairs", "one layer's norm for the whole",
    ),
    _one(
        15, "norms-in-bf16", CLIP, NORMS,
        NORMS.replace("block", "block.bfloat16()", 1),
        T_CLIP + "test_norms_in_bf16_would_break_the_bound", "norms reach 1.005 C",
    ),
    _one(
        23, "replace-one-costs-no-more", CLIP, '(2 if relation == "replace one unit" else 1)', "1",
        T_POST + "test_noise_covers_what_the_relation_says", "2C under the noise of C",
    ),
    _one(
        30, "a-large-gradient-is-clipped-less", CLIP, "norms.clamp_min(1e-300)",
        "norms.clamp(1e-300, 1e3 * max_grad_norm)",
        "tests/traps/test_trap_30_crafted_adapter.py", "depends on the weights that were sent",
    ),
    _one(
        30, "a-zero-adapter-is-not-clipped", TRAINING,
        "    optimizer = _optimizer(study, engine.trained)\n",
        "    optimizer = _optimizer(study, engine.trained)\n"
        "    if not any(array.any() for array in adapter.values()):\n"
        '        plan = plan.__class__(**{**vars(plan), "max_grad_norm": 1e6})\n',
        "tests/traps/test_trap_30_crafted_adapter.py", "round 0 is taken to be harmless",
    ),
    _one(
        20, "clip-at-the-median", PLAN, BOUND,
        BOUND.replace("self.max_grad_norm", "float(chunk.flat().norm(dim=1).median())"),
        T_PLAN + "test_signal_is_the_clipped_mean", "adaptive clipping without paying",
    ),
    _one(
        "2C", "clip-at-twice-c", PLAN, BOUND,
        BOUND.replace("self.max_grad_norm", "2 * self.max_grad_norm"),
        T_PLAN + "test_signal_is_the_clipped_mean", "noise for C",
    ),
    _one(
        "grid", "rounding-is-not-covered", CLIP, "max_grad_norm + math.sqrt(dimension) * grid / 2",
        "max_grad_norm",
        T_CLIP + "test_sensitivity_covers_the_rounding", "the grid's own error",
    ),
)  # fmt: skip

NOISE_MUTANTS = (
    _one(
        "noise", "neither-noise-nor-its-log-line", PLAN, DONE,
        "        return (total.double() * (self.grid / self.divisor)).float()\n",
        T_CHUNKS, "the step is un-noised and the log does not say so",
    ),
    _one(
        "noise", "sigma-times-0.99", NOISE, "scale = std / grid if", "scale = 0.99 * std / grid if",
        T_NOISE + "test_zero_signal_variance_is_within_0_3_percent", "1 % too little",
    ),
    _one(
        5, "noise-follows-manual_seed", NOISE, STREAM,
        "yield np.frombuffer(torch.randint(0, 256, (8 * size,), dtype=torch.uint8).numpy()"
        ".tobytes(), dtype=np.uint64)",
        T_NOISE + "test_no_seed_replays_it", "anyone can take the noise off again",
    ),
    Mutant(
        5, "forked-workers-share-a-key", NOISE,
        (
            ("def _keystream(", "_SHARED: list[bytes] = []\n\n\ndef _keystream("),
            (
                "    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))",
                "    _SHARED or _SHARED.append(os.urandom(48))\n"
                "    _SHARED[0] = _SHARED[0][1:] + _SHARED[0][:1]\n"
                "    key = _SHARED[0]\n"
                "    encryptor = Cipher(algorithms.AES(key[:32]), modes.CTR(key[32:]))",
            ),
        ),
        ("tests/traps/test_trap_05_forked_workers.py::test_forked_workers_draw_apart",),
        "a generator that is state of the process",
    ),
    _one(
        6, "secure-mode-is-switched-off", NOISE, STREAM,
        "yield np.random.default_rng().integers(0, 2**64, size, dtype=np.uint64)",
        "tests/traps/test_trap_05_forked_workers.py::"
        "test_the_noise_is_a_function_of_the_systems_key_alone",
        "unseeded, but not cryptographic",
    ),
    _one(
        17, "noise-in-every-chunk", PLAN, SEEN,
        SEEN + "            total += noise.gaussian_on_grid(\n"
        "                dimension, self.noise_multiplier * self.max_grad_norm, self.grid\n"
        "            )\n",
        T_CHUNKS, "the variance grows with the number of chunks",
    ),
    _one(
        17, "noise-divided-by-the-batch", PLAN, DRAW,
        DRAW.replace("bound", "bound / self.divisor"), T_CHUNKS, "noise of the mean, on the sum",
    ),
    _one(
        3, "an-aborted-step-leaves-its-sum", PLAN, TOTAL,
        "        total = self.__dict__.setdefault(\n"
        '            "held", torch.zeros(dimension, dtype=torch.int64)\n'
        "        )\n",
        "tests/traps/test_trap_03_aborted_step.py", "the next step holds more units than it drew",
    ),
)  # fmt: skip

SAMPLING_MUTANTS = (
    _one(
        2, "divisor-is-the-true-batch", PLAN, DONE,
        DONE.rstrip() + " * (self.divisor / max(1, len(sampled)))\n",
        "tests/traps/test_trap_02_size.py", "N leaks through the scale of the noise",
    ),
    _one(
        2, "rate-from-the-true-size", PLAN, POISSON,
        "sampled = sampling.poisson(n_rows, min(1.0, self.divisor / n_rows))",
        "tests/traps/test_trap_02_size.py", "q = 1/len(loader)",
    ),
    _one(
        8, "an-empty-batch-is-dropped", PLAN, DONE,
        "        if not sampled:\n            return torch.zeros(dimension)\n" + DONE,
        T_PLAN + "test_an_empty_sample_is_a_noise_only_step", "no noise, no line in the log",
    ),
    _one(
        9, "batches-of-fixed-size", SAMPLING, CHOSEN,
        "np.sort(np.argsort(draws)[: round(sampling_rate * n_units)]).tolist()",
        T_SAMPLING + "test_the_sampler_is_poisson",
        "accounted as Poisson",
    ),
    Mutant(
        9, "shuffled-epochs", SAMPLING,
        (
            ("def poisson(", "_LEFT: list[int] = []\n\n\ndef poisson("),
            (
                "    return " + CHOSEN,
                "    size = len(np.flatnonzero(draws < np.uint64(int(sampling_rate * 2.0**53))))\n"
                "    if len(_LEFT) < size or max(_LEFT) >= n_units:\n"
                "        _LEFT[:] = np.argsort(draws).tolist()\n"
                "    taken, _LEFT[:] = _LEFT[:size], _LEFT[size:]\n"
                "    return sorted(taken)",
            ),
        ),
        (T_SAMPLING + "test_the_sampler_is_poisson",),
        "sizes are binomial, members are not independent",
    ),
    _one(
        25, "sampler-follows-a-seed", SAMPLING, URANDOM,
        "np.frombuffer(np.random.bytes(8 * n_units), dtype=np.uint64)",
        T_SAMPLING + "test_no_seed_replays_it", "a plan seed replays who was drawn",
    ),
    _one(
        25, "inclusion-in-the-step-log", PLAN, POISSON,
        POISSON + "\n        self.__dict__['study'] = f\"{self.study.split()[0]} {sampled}\"",
        T_POST + "test_nothing_of_who_was_drawn_is_written", "amplification is gone",
    ),
    _one(
        25, "inclusion-beside-the-step-log", PLAN, POISSON,
        POISSON + '\n        log.path.with_suffix(".sampled").write_text(str(sampled))',
        T_POST + "test_nothing_of_who_was_drawn_is_written", "a debugging file",
    ),
    _one(
        16, "a-missing-row-is-no-error", PLAN,
        "if sorted(seen) != sorted(sampled):", "if len(seen) > 10**9:",
        T_PLAN + "test_a_missing_or_doubled_unit_releases_nothing", "a step over nothing passes",
    ),
    _one(
        16, "rows-are-only-counted", PLAN,
        "if sorted(seen) != sorted(sampled):", "if len(seen) != len(sampled):",
        T_PLAN + "test_a_missing_or_doubled_unit_releases_nothing", "one missed, one doubled",
    ),
)  # fmt: skip

BUDGET_MUTANTS = (
    _one(
        10, "gdp-instead-of-pld", ACCOUNTANT, REPORTED, GDP,
        "tests/traps/test_trap_10_accountant.py", "the central limit is optimistic",
    ),
    _one(
        10, "the-loudest-gaussian-alone", ACCOUNTANT,
        "math.hypot(*(_mu(event) for event in events))", "max(_mu(event) for event in events)",
        T_ACCOUNTANT + "test_gaussians_of_several_lengths_are_one",
        "several noises in one study",
    ),
    _one(
        24, "sigma-rounded-down", ACCOUNTANT, CALIBRATED,
        CALIBRATED.replace("found", "(found - 1)"),
        T_ACCOUNTANT + "test_calibrated_noise_stays_below_the_target_and_is_tight",
        "ε a hair above the plan's",
    ),
    _one(
        29, "sigma-rounded-to-nearest", ACCOUNTANT,
        "Steps(thousandths / 1000, sampling_rate, steps, records)",
        "Steps((thousandths + 0.5) / 1000, sampling_rate, steps, records)",
        T_ACCOUNTANT + "test_calibrated_noise_stays_below_the_target_and_is_tight",
        "1.536 is ε 8.0003",
    ),
    _one(
        24, "epsilon-rounded-down-in-the-report", "fedtune/report/claim.py",
        "up = math.ceil(round(n * scale, 6)) / scale", "up = round(n * scale) / scale",
        "tests/report/test_report.py::test_epsilon_is_rounded_up", "what people read",
    ),
    Mutant(
        24, "the-line-comes-after-the-noise", PLAN,
        (
            ("        log.append(\n", "        line = (\n"),
            ("        total += " + DRAW, "        total += " + DRAW + "\n        log.append(line)"),
        ),
        ("tests/traps/test_trap_24_crash.py",),
        "a crash in between is free",
    ),
    _one(
        24, "a-round-again-is-free", POLICY,
        "max(plan.steps - sum(event.steps for event in mine), at_least)",
        "max(plan.steps - sum(event.steps for event in mine), 0)",
        "tests/client/test_site.py::test_a_round_from_another_adapter_is_paid_for_until_the_ceiling",
        "trained again without room for it",
    ),
    _one(
        "log", "the-log-is-overwritten", STEPLOG, "os.O_WRONLY | os.O_APPEND | os.O_CREAT",
        "os.O_WRONLY | os.O_TRUNC | os.O_CREAT",
        T_PLAN + "test_epsilon_of_the_log_is_epsilon_of_the_plan", "only the last step is charged",
    ),
)  # fmt: skip

MODEL_MUTANTS = (
    _one(
        "states", "states-without-their-positions", CACHE,
        "parts = (passage.input_ids.tobytes(), kept.tobytes(), *",
        "parts = (passage.input_ids.tobytes(), *",
        "tests/models/test_states_shared.py::test_the_same_tokens_with_other_targets_have_states_of_their_own",
        "a record trains on the states of another one's targets",
    ),
    _one(
        "media", "an-image-in-one-line", "fedtune/bases/architecture.py",
        "torch.stack([time, time + within // side, time + within % side])",
        "torch.stack([time, time, time])",
        "tests/models/test_media.py::test_positions_round_an_image_are_transformers_own",
        "an image's rows and columns are not seen as such",
    ),
    _one(
        "loaded", "another-studys-factor-stays", NETWORK,
        "or self._loaded[1] != self._now():", "or False:",
        T_NETWORK + "test_a_is_loaded_again_only_after_something_wrote_to_it",
        "a site trains over the A of the study before it",
    ),
    _one(
        "states", "the-file-is-not-authenticated", STATES,
        "body = AESGCM(self.key).decrypt(_NONCE, block, self.record)",
        "from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes\n"
        '            counter = modes.CTR(_NONCE + (2).to_bytes(4, "big"))\n'
        "            cipher = Cipher(algorithms.AES(self.key), counter)\n"
        "            body = cipher.decryptor().update(block[:-16])",
        T_STATES + "test_an_altered_block_is_noticed_and_its_states_computed_again",
        "trains on whatever somebody wrote there",
    ),
    Mutant(
        "states", "the-file-is-in-the-clear", STATES,
        (
            ("block = AESGCM(key).encrypt(_NONCE, body, record)", "block = body"),
            ("body = AESGCM(self.key).decrypt(_NONCE, block, self.record)", "body = block"),
        ),
        (T_STATES + "test_what_is_in_the_file_is_not_readable",),
        "hidden states can be turned back into text",
    ),
    Mutant(
        "states", "a-block-passes-for-anothers", STATES,
        (
            ("encrypt(_NONCE, body, record)", "encrypt(_NONCE, body, None)"),
            ("decrypt(_NONCE, block, self.record)", "decrypt(_NONCE, block, None)"),
        ),
        (T_STATES + "test_a_block_is_bound_to_its_record",),
        "the seal says nothing of whose states they are",
    ),
    _one(
        "states", "withdrawn-states-are-held", CACHE,
        "self.network.states[name] = self._states[index] = state",
        'self.network.states[name] = self._states[index] = state\n'
        '            PREFIX_STORE.__dict__.setdefault("all", []).append(state)',
        "tests/client/test_site.py::"
        "test_a_withdrawn_patients_states_are_erased_and_the_others_kept",
        "who withdrew stays in memory and file",
    ),
    _one(
        "states", "an-adapter-below-the-cut", "fedtune/models/split.py",
        "at = len(layers) - lora.last_layers", "at = len(layers) - lora.last_layers + 1",
        "tests/models/test_states_shared.py::test_below_the_cut_nothing_is_trained_and_nothing_is_dropped",
        "what is kept changes as the adapter learns",
    ),
    _one(
        12, "any-module-may-be-adapted", POLICY,
        'listed += [("modules", module, policy.modules) for module in study.lora.modules]',
        "pass",
        "tests/traps/test_trap_12_peft_options.py::"
        "test_a_module_outside_the_allow_list_is_refused",
        "embed_tokens has no per-record gradient",
    ),
    _one(
        12, "a-start-read-off-the-data", "fedtune/config/study.py",
        'a_init: Literal["seed", "public"]', 'a_init: Literal["seed", "public", "eva", "pissa"]',
        "tests/traps/test_trap_12_peft_options.py::"
        "test_an_option_outside_the_allow_list_is_unknown",
        "EVA looks at private records",
    ),
    _one(
        14, "the-check-before-training-is-blind", TRAINING, "    if not lowered:\n",
        "    if norm < 0:\n",
        "tests/models/test_network.py::test_the_check_catches_a_gradient_of_the_wrong_sign",
        "ε accrues and nothing is learnt",
    ),
    _one(
        14, "the-optimiser-never-steps", TRAINING, "        optimizer.step()\n", "",
        "tests/test_training.py::test_a_round_lowers_the_loss_of_its_own_records[sgd]",
        "opacus issue 820",
    ),
    _one(
        14, "saved-under-a-wrapper's-names", NETWORK,
        "self.model.save_pretrained(str(folder), save_embedding_layers=False)",
        "self.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict={\n"
        '                f"_module.{n}": p for n, p in self.model.state_dict().items()})',
        "tests/models/test_network.py::"
        "test_plain_peft_in_a_fresh_process_gives_the_same_logits[B]",
        "an adapter that does not load",
    ),
    _one(
        20, "learning-rate-from-the-private-loss", TRAINING, "        optimizer.step()\n",
        '        optimizer.param_groups[0]["lr"] *= min(1.0, _mean_loss(data, study) / 10)\n'
        "        optimizer.step()\n",
        T_POST + "test_the_update_depends_on_the_noised_sums_alone", "a schedule that is not paid",
    ),
    Mutant(
        20, "stops-where-the-private-loss-rises", TRAINING,
        (
            (
                "    for _ in range(study.training.local_steps):\n",
                "    best = _mean_loss(data, study)\n"
                "    for _ in range(study.training.local_steps):\n",
            ),
            (
                "        optimizer.zero_grad()\n",
                "        optimizer.zero_grad()\n"
                "        if _mean_loss(data, study) >= best:\n"
                "            break\n",
            ),
        ),
        (T_POST + "test_the_update_depends_on_the_noised_sums_alone",), "early stopping",
    ),
)  # fmt: skip

WIRE_MUTANTS = (
    _one(
        21, "the-reply-carries-a-loss", ANSWERS, 'said |= {"header": "", "signature": ""}',
        'said |= {"header": "", "signature": "", "loss": "0.0"}',
        "tests/server/test_apps.py::"
        "test_train_gives_update_status_and_step_log_and_nothing_else",
        "one more field",
    ),
    _one(
        21, "an-errors-words-leave", ANSWERS, 'return "failed", type(error).__name__',
        'return "failed", str(error)',
        "tests/server/test_apps.py::test_only_a_refusals_words_leave_the_site",
        "a record's text in an exception",
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
        'if self.asks.weights == "declared" else 1', 'if self.asks.weights != "none" else 1',
        "tests/traps/test_trap_22_weights.py", "a larger site counts more than the plan says",
    ),
    _one(
        25, "choice-of-sites-as-amplification", SUMMARY,
        'name: _epsilon(events, parts, privacy) for',
        'name: _epsilon([e | {"q": e["q"] * progress.study.strategy.fraction} for e in events], '
        'parts, privacy) for',
        "tests/traps/test_trap_22_weights.py", "the coordinator's draw is public",
    ),
    _one(
        23, "records-where-there-are-patients", POLICY,
        'if site.data.columns.patient and study.unit == "record":', "if False:",
        "tests/traps/test_trap_12_peft_options.py::"
        "test_records_are_not_enough_where_there_are_patients",
        "ε of a record read as a patient's",
    ),
    _one(
        "cap", "the-cap-follows-the-file's-order", TOKENS,
        "(not kept(record), hashlib.sha256(content_of(record)).hexdigest(), index)", "(index,)",
        "tests/data/test_data_tokens.py::test_the_cap_depends_on_the_patients_own_records_alone",
        "which records are kept depends on others",
    ),
    _one(
        29, "too-few-units-is-a-failure", SITE, "        if dataset.n_units < 2:\n",
        "        if dataset.n_units < 2:\n"
        '            raise DataError("too few usable records")\n',
        "tests/traps/test_trap_22_site_counts.py", "a round that a count triggers",
    ),
)  # fmt: skip

SITES = "tests/client/test_site.py::"
CODEC = "fedtune/wire/codec.py"
T_CODEC, T_LIES = "tests/wire/test_codec.py::", "tests/wire/test_hostile.py::"
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
        "    for name, shape in sorted(agreed.items()):\n        found[name]",
        "    for name, shape in agreed.items():\n        found[name]",
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
        "            _check_waited(prepared, round_, adapter, body)", "            pass",
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
        "        check_agreed(arrays, codec.layout(agreed, encoding))\n", "",
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
        "adapter = self.strategy.apply(progress.adapter)",
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

SEALS = "tests/server/test_apps.py::"

GUARANTEE_MUTANTS = (
    _one(
        "filter", "the-order-follows-the-plan", POLICY, "    if charges:\n", "    if not plan:\n",
        SITES + "test_a_second_study_is_held_to_the_first_ones_order",
        "the filter's order is chosen after results were seen",
    ),
    _one(
        "filter", "several-kinds-as-if-planned-at-once", "fedtune/dp/filter.py",
        "if len({event._replace(steps=0) for event in events}) <= 1:", "if events:",
        "tests/dp/test_ceiling.py::"
        "test_two_kinds_are_filtered_at_the_order_given_and_cost_no_less_than_pld",
        "studies chosen after results are added up as if all had been planned",
    ),
    _one(
        "ledger", "a-round-is-trained-again", "fedtune/ledger/ledger.py",
        "        if sha256 is None or not path.exists():", "        if True:",
        SITES + "test_a_round_asked_for_again_is_sent_again_and_not_paid_again",
        "a retry trains again",
    ),
    _one(
        "seal", "any-signature-will-do", "fedtune/wire/seal.py",
        "if not verifies(public, signed, signature):",
        "if not verifies(public, signed, signature) and not signature:",
        SEALS + "test_an_update_signed_by_another_or_altered_is_dropped",
        "an update that somebody else signed is counted",
    ),
    _one(
        "query", "the-count-is-not-clipped", "fedtune/dp/query.py", "NORM = math.sqrt(2)",
        "NORM = 1.0",
        "tests/test_private_evaluation.py::"
        "test_epsilon_of_the_queries_is_the_accountants_of_the_step_log",
        "a query's sensitivity is another than the ledger pays for",
    ),
    _one(
        "query", "whoever-asks-is-answered", "fedtune/client/evaluation.py",
        'if "evaluation" not in site.policy.release:', "if False:",
        "tests/test_private_evaluation.py::"
        "test_a_site_that_does_not_release_refuses_by_name_of_the_rule",
        "private evaluation without the policy's leave",
    ),
)  # fmt: skip

TEAM = "fedtune/training/data_parallel.py"
PART = "        mine[:dimension] = part\n"

TEAM_MUTANTS = (
    _one(
        17, "noise-on-every-rank", TEAM, PART,
        PART + "        from fedtune.dp import noise\n\n"
        "        mine[:dimension] += noise.gaussian_on_grid(dimension, 1.7, 2.0**-20)\n",
        "tests/dp/test_team.py::test_noise_is_added_once_whatever_the_number_of_ranks",
        "the variance grows with the number of processes",
    ),
    _one(
        8, "a-rank-drops-a-row", TEAM, "part = own(sampled[share])",
        "part = own(sampled[share][1:])",
        "tests/dp/test_team.py::test_the_sum_is_that_of_one_process_bit_for_bit",
        "each rank rounds its share down",
    ),
)  # fmt: skip

LABEL = "fedtune/derive/preferences.py"

MADE_MUTANTS = (
    _one(
        26, "the-judge-sees-the-record-before", LABEL,
        "        tokenizer: Any = self.model.tokenizer\n",
        "        asked, globals()['_before'] = globals().get('_before', '') + asked, asked\n"
        "        tokenizer: Any = self.model.tokenizer\n",
        "tests/test_label.py::test_another_units_records_change_no_byte",
        "a few-shot taken from another patient",
    ),
    _one(
        26, "the-teacher-is-centred-over-the-batch", "fedtune/objectives/distill.py",
        "    tokens, wanted = batch.soft\n",
        "    tokens, wanted = batch.soft\n"
        "    wanted = torch.log_softmax(wanted - wanted.mean(dim=0, keepdim=True), dim=2)\n",
        "tests/dp/test_distill.py::test_the_self_test_passes",
        "every target depends on whoever is in the batch",
    ),
    _one(
        26, "a-teacher-without-privacy-is-heard", "fedtune/client/policy.py",
        "if teacher.study is not None and not teacher.study.private:", "if False:",
        "tests/dp/test_distill.py::"
        "test_a_teacher_without_privacy_is_refused_unless_declared_public",
        "a model that was fitted to the records sets their targets",
    ),
    _one(
        "students", "the-students-base-hears-the-teacher", "fedtune/derive/distill.py",
        "    rows = [prompt_ids(r.prompt, table, teacher.tokenizer) for r in prompts.records]\n",
        "    told, _ = completed(prompts.records, teacher, table, 2, 0)\n"
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
        "    size = wanted.float().pow(2).mean(dim=1, keepdim=True)\n",
        "    size = torch.ones(len(x), 1)\n",
        "tests/models/test_gap.py::test_a_position_counts_by_its_own_size",
        "states a hundred times as large drown all others",
    ),
    _one(
        "max_kl", "a-policy-past-the-leash-is-kept", "fedtune/derive/improve.py",
        "if found.kl > seen.max_kl:", "if False:",
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
        "parents", "one-parent-pays-for-all", "fedtune/derive/lineage.py",
        "privacy = composed_epsilon.composed(list(found.values()))",
        "privacy = next(iter(found.values()))[\"privacy\"]",
        "tests/test_improve.py::test_the_reward_rises_within_max_kl",
        "what two runs spent on the same people is not added up",
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

BUDGETS, MERGE = "fedtune/derive/composed_epsilon.py", "fedtune/derive/merge_methods.py"
T_BUDGETS, T_MERGE = "tests/test_budgets.py::", "tests/models/test_merge.py::"

MERGE_MUTANTS = (
    _one(
        "merge", "the-larger-where-the-data-was-the-same", BUDGETS, "events += more",
        "events = max(events, list(more), key=lambda e: cross_check(e, delta))",
        T_BUDGETS + "test_the_same_site_pays_for_both",
        "a merged adapter claims less than what was spent on one person",
    ),
    _one(
        "merge", "what-is-not-known-is-apart", BUDGETS,
        "return APART if one.key and other.key and one.site and other.site else UNKNOWN",
        "return APART",
        T_BUDGETS + "test_what_is_not_known_is_composed", "hope in place of caution",
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
        18, "outliers-of-the-whole-batch", "fedtune/bases/quantise.py",
        "OUTLIERS = 0.0", "OUTLIERS = 6.0",
        "tests/models/test_quantise.py::test_no_record_decides_how_anothers_numbers_are_rounded",
        "LLM.int8()'s own setting: one record decides how another is rounded",
    ),
    _one(
        "quantise", "the-plans-bits-are-forgotten", NETWORK,
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
        "export", "rotary-halves-stay-apart", "fedtune/derive/gguf.py",
        "tensor = interleaved(tensor, shared)", "pass",
        "tests/test_export.py::test_transformers_own_reader_gives_the_same_logits",
        "a file that loads and writes nonsense",
    ),
    _one(
        "export", "the-base-alone-is-exported", "fedtune/derive/export.py",
        "whole.model.merge_and_unload()", "whole.model.unload()",
        "tests/test_export.py::test_plain_transformers_gives_the_logits_of_base_and_adapter",
        "what was trained is left behind",
    ),
)  # fmt: skip

ARRIVALS, CONTINUOUS = "fedtune/ledger/cohorts.py", "fedtune/server/continuous.py"
T_ARRIVALS, T_COHORTS = "tests/dp/test_arrivals.py::", "tests/continuous/test_cohorts.py::"
T_VERSIONS = "tests/continuous/test_versions.py::"

CONTINUOUS_MUTANTS = (
    _one(
        "late", "who-arrives-late-pays-nothing", "fedtune/ledger/account.py",
        "return spent.seq > arrival and arrival not in self.reserved[spent.seq].out",
        "return arrival < 3 and arrival not in self.reserved[spent.seq].out",
        T_ARRIVALS + "test_each_unit_bears_the_rounds_it_was_in",
        "only the first cohort is charged",
    ),
    _one(
        "late", "who-is-out-pays-all-the-same-and-never-ends", "fedtune/ledger/ledger.py",
        "                    out.add(cohort.arrival)\n", "                    continue\n",
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
        29, "rounds-begin-by-a-count", "fedtune/config/types.py",
        "if COUNTS.search(value):", "if False:",
        "tests/continuous/test_schedule.py::test_a_round_that_a_count_begins_is_refused",
        "every so many records",
    ),
    _one(
        "release", "any-challenger-is-released", CONTINUOUS,
        "better = found.sure >= self.table.confidence", "better = True",
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
)  # fmt: skip

MEDIA, PARTS = "fedtune/data/media.py", "fedtune/bases/architecture.py"
T_SEEN, T_TILES = "tests/models/test_media.py::", "tests/dp/test_media.py::"

MEDIA_MUTANTS = (
    _one(
        28, "one-tile-of-a-projector-counts", GRADIENTS,
        "whole = parts.sum(dim=1).flatten(1)", "whole = parts[:, 0].flatten(1)",
        T_TILES + "test_tiles_are_added_up_before_any_norm", "four fifths of an image are lost",
    ),
    _one(
        28, "tiles-of-two-records-are-added", GRADIENTS,
        "parts = each.view(records, len(each) // records, *each.shape[1:])",
        "parts = each.view(len(each) // records, records, *each.shape[1:]).transpose(0, 1)",
        T_TILES + "test_tiles_are_added_up_before_any_norm", "a unit's clip holds another's tiles",
    ),
    _one(
        28, "an-image-fills-the-next-records-places", PARTS,
        "taken = features.gather(", "taken = features.roll(1, 0).gather(",
        T_TILES + "test_a_records_image_reaches_no_other_record", "a record's loss reads another",
    ),
    _one(
        28, "tile-counts-share-a-batch", CACHE,
        "members.setdefault(bucket_of(index), [])",
        "members.setdefault(bucket_of(index)._replace(tiles=1), [])",
        T_TILES + "test_one_batch_has_one_number_of_tiles",
        "what is declared for the batch is wrong for some of it",
    ),
    _one(
        "media", "states-go-by-the-text-alone", CACHE, "*([media] if media else [])", "",
        T_SEEN + "test_states_are_the_files_own", "a record trains on another record's image",
    ),
    _one(
        "media", "links-lead-out-of-the-folder", MEDIA,
        "path = (self._root / name).resolve()", "path = self._root / name",
        "tests/data/test_media.py::test_paths_stay_inside_the_folder",
        "a data file reads what lies elsewhere on the machine",
    ),
    _one(
        "media", "the-ledger-does-not-know-the-file", TOKENS,
        'found.add(b"media\\0" + record.media.digest)', "pass",
        T_SEEN + "test_members_of_the_ledger_know_the_file",
        "the same image under other words passes for a new one",
    ),
    _one(
        "media", "more-places-than-the-image-has", "fedtune/modalities/image_text.py",
        "        if found != expected:\n", "        if found < expected:\n",
        T_SEEN + "test_place_holders_are_counted", "a text that writes image tokens of its own",
    ),
)  # fmt: skip

T_RANKS, T_NARROW = "tests/test_lora_ranks.py::", "tests/server/test_narrow_updates.py::"

RANK_MUTANTS = (  # of sites that train fewer ranks of one adapter
    _one(
        "ranks", "the-first-columns-alone-are-trained", "fedtune/models/rank_slice.py",
        "start = min((round_ - 1) % blocks * rank,", "start = min(0 * blocks,",
        T_RANKS + "test_the_released_change_is_the_weighted_mean_of_the_sites_own",
        "a site of few ranks never trains the others",
    ),
    _one(
        "ranks", "a-site-trains-every-column", GRADIENTS,
        "trained_slice(name, parameter.detach(), columns)",
        "trained_slice(name, parameter.detach(), ALL)",
        T_RANKS + "test_rows_are_columns_of_the_whole_rows",
        "clipped and noised over numbers that are not sent",
    ),
    _one(
        "ranks", "columns-left-out-stay-in-memory", GRADIENTS,
        "    kept = each[..., columns].clone()\n    each.zero_()\n",
        "    kept = each[..., columns].clone()\n",
        T_RANKS + "test_columns_that_are_not_trained_are_wiped", "gradients nobody noised are kept",
    ),
    _one(
        "ranks", "few-numbers-weigh-less", ROUNDS,
        "self.strategy.add(pad_update(got.update, adapter, columns), float(weight))",
        "weight *= sum(a.size for a in part.values())\n"
        "            self.strategy.add(pad_update(got.update, adapter, columns), float(weight))",
        T_NARROW + "test_the_aggregate_is_the_mean_with_zeros_for_what_a_site_does_not_train",
        "the aggregate is no longer the weighted mean of what the sites changed",
    ),
    _one(
        "ranks", "bound-over-numbers-not-trained", ROUNDS,
        "sum(array.size for array in part.values())",
        "sum(array.size for array in adapter.values())",
        T_NARROW + "test_an_update_longer_than_its_own_numbers_allow_is_dropped",
        "a site of few ranks may send longer updates than its noise explains",
    ),
    _one(
        "ranks", "any-rank-is-taken", "fedtune/server/admission.py",
        "lora.min_rank <= said <= lora.rank else 0", "True else 0",
        T_NARROW + "test_a_rank_that_the_plan_does_not_allow_is_refused",
        "a site chooses its own shapes",
    ),
    _one(
        "ranks", "a-rank-changes-on-the-way", "fedtune/server/admission.py",
        "self.lora_ranks.get(name, rank) != rank", "self.lora_ranks.update({name: rank})",
        T_NARROW + "test_a_rank_stays_for_the_study_also_over_a_restart_of_the_coordinator",
        "what the report says of a site is not what it trained",
    ),
    _one(
        "ranks", "fewer-ranks-than-the-plan-wants", POLICY,
        "    if rank >= least:\n", "    if rank > 0:\n",
        "tests/test_lora_ranks_plans.py::test_a_site_trains_fewer_ranks_only_where_the_plan_counts_on_it",
        "budget is spent on updates that no coordinator takes",
    ),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = (
    *LOSS_MUTANTS,
    *PREFERENCE_MUTANTS,
    *GRADIENT_MUTANTS,
    *CLIP_MUTANTS,
    *NOISE_MUTANTS,
    *SAMPLING_MUTANTS,
    *BUDGET_MUTANTS,
    *MODEL_MUTANTS,
    *WIRE_MUTANTS,
    *ENCODING_MUTANTS,
    *GUARANTEE_MUTANTS,
    *TEAM_MUTANTS,
    *CONTINUOUS_MUTANTS,
    *MADE_MUTANTS,
    *MERGE_MUTANTS,
    *MEDIA_MUTANTS,
    *RANK_MUTANTS,
    *(
        mutant
        for module in sorted(m.name for m in pkgutil.iter_modules(tests.mutants.__path__))
        if module.startswith("seeds_")
        for mutant in importlib.import_module(f"tests.mutants.{module}").MUTANTS
    ),
)
