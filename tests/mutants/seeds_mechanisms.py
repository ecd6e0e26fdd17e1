"""Seeded bugs of clip, noise, sampling and what a budget counts."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.mutant import one as _one
from tests.mutants.places import (
    ACCOUNTANT,
    BOUND,
    BUDGET,
    CALIBRATED,
    CHOSEN,
    CLIP,
    DONE,
    DRAW,
    GDP,
    LEDGER,
    MECHANISM,
    NOISE,
    NORMS,
    PLAN,
    POISSON,
    REPORTED,
    SAMPLING,
    SEEN,
    SITE,
    STREAM,
    T_ACCOUNTANT,
    T_BUDGET,
    T_CHUNKS,
    T_CLIP,
    T_NOISE,
    T_PLAN,
    T_POST,
    T_SAMPLING,
    TOTAL,
    TRAINING,
    URANDOM,
)

CLIP_MUTANTS = (
    _one(
        4, "nan-passes-the-clip", CLIP,
        "usable = torch.isfinite(norms) & (norms >= LEAST_NORM)",
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
        30, "a-large-gradient-is-clipped-less", CLIP, "norms.clamp_min(1e-300)",
        "norms.clamp(1e-300, 1e3 * max_grad_norm)",
        "tests/traps/test_trap_30_crafted_adapter.py",
        "by the weights that it sends, a coordinator makes a gradient pass the clip",
    ),
    _one(
        30, "a-zero-adapter-is-not-clipped", TRAINING,
        "    optimizer = _optimizer(study, engine.trained, round_)\n",
        "    optimizer = _optimizer(study, engine.trained, round_)\n"
        "    if not any(array.any() for array in adapter.values()):\n"
        '        plan = plan.__class__(**{**vars(plan), "max_grad_norm": 1e6})\n',
        "tests/traps/test_trap_30_crafted_adapter.py", "round 0 is taken to be harmless",
    ),
    _one(
        20, "clip-at-the-median", MECHANISM, BOUND,
        BOUND.replace("bound.norm", "float(chunk.flat().norm(dim=1).median())"),
        T_PLAN + "test_signal_is_the_clipped_mean", "adaptive clipping without paying",
    ),
    _one(
        "2C", "clip-at-twice-c", MECHANISM, BOUND,
        BOUND.replace("bound.norm", "2 * bound.norm"),
        T_PLAN + "test_signal_is_the_clipped_mean", "the clip is at 2 C, the noise is for C",
    ),
    _one(
        "grid", "rounding-is-not-covered", CLIP, "max_grad_norm + math.sqrt(dimension) * grid / 2",
        "max_grad_norm",
        T_CLIP + "test_sensitivity_covers_the_rounding",
        "the noise is for C, but rounding to the grid can add a little to C",
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
        T_NOISE + "test_zero_signal_variance_is_within_0_3_percent", "the noise is 1 % too small",
    ),
    _one(
        "noise", "one-radius-for-two-numbers", NOISE,
        "np.rint(first + second)", "np.rint(math.sqrt(2.0) * first)",
        T_NOISE + "test_no_pair_of_the_tail_says_that_it_is_noise",
        "two large numbers of noise made of one radius lie on one of few circles; a pair on none "
        "of them shows whether a unit took part",
    ),
    _one(
        "clock", "a-template-reads-the-clock", "fedtune/core/data/chat.py",
        'if "strftime_now" in template:', "if False:",
        "tests/data/test_chat.py::test_a_template_that_names_the_date_gets_one_that_stands",
        "how long one patient's records took decides about others' tokens at midnight",
    ),
    _one(
        "clock", "a-template-draws", "fedtune/core/data/load.py",
        "    if columns.messages:\n        check_draws_nothing(tokenizer)\n", "",
        "tests/data/test_chat.py::test_a_study_of_a_template_that_draws_is_refused",
        "records share one generator",
    ),
    _one(
        "imports", "a-record-decides-what-is-imported", "fedtune/core/data/media.py",
        "        _import_what_reads_kept_forms(self._kind)\n", "",
        "tests/data/test_media.py::test_no_record_decides_which_modules_are_imported",
        "that a site has an image at all is seen in the page cache",
    ),
    _one(
        "grid", "a-row-of-zeros-has-a-factor", "fedtune/core/dp/clip.py",
        "torch.isfinite(norms) & (norms >= LEAST_NORM)", "torch.isfinite(norms)",
        "tests/dp/test_clip.py::test_a_row_of_nearly_zeros_stays_zero",
        "a row that failed adds 10¹³ C where γ is tiny",
    ),
    _one(
        "grid", "a-rows-norm-goes-by-its-neighbours", "fedtune/core/dp/clip.py",
        "step = _COLUMNS.get(flat.device.type, _MORE)", "step = max(1, 2**18 // len(flat))",
        "tests/dp/test_clip.py::test_a_rows_scale_is_the_same_to_the_last_bit_beside_any_others",
        "the sum without a row is not the sum less what that row added",
    ),
    _one(
        "experts", "experts-that-are-left-out-pass", "fedtune/core/bases/find.py",
        "experts_in(model.config.to_dict())", "experts_in({})",
        "tests/models/test_base.py::test_experts_that_the_configuration_leaves_out_are_found",
        "an expert multiplies the tokens of all records together",
    ),
    _one(
        "clock", "a-template-draws-by-map", "fedtune/core/data/chat.py",
        '    if used.name != "map":\n', "    if True:\n",
        "tests/data/test_chat.py::test_a_template_that_draws_is_refused",
        "a filter that another filter calls by its name",
    ),
    _one(
        "clock", "a-template-writes-addresses", "fedtune/core/data/chat.py",
        '_list_used_names(parsed) & {"cycler", "joiner"}', "set[str]()",
        "tests/data/test_chat.py"
        "::test_a_template_that_writes_where_an_object_lies_is_refused",
        "what earlier records left in memory decides about a record's tokens",
    ),
    _one(
        "sources", "a-mark-in-a-later-line-counts", "fedtune/core/data/sources/jsonl.py",
        "line = line.removeprefix(BOM)  # in any line, since files are joined",
        "line = line.removeprefix(BOM) if number == 1 else line",
        "tests/data/test_rows.py::test_a_mark_in_any_line_is_taken_off",
        "a row is read if nobody's stands before it",
    ),
    _one(
        "sources", "rows-are-decoded-together-or-not-at-all",
        "fedtune/core/data/sources/parquet.py",
        "    except pa.ArrowNotImplementedError:\n        pass\n",
        "    except pa.ArrowNotImplementedError:\n        raise\n",
        "tests/data/test_arrow_values.py::"
        "test_rows_that_cannot_be_decoded_together_are_decoded_alone",
        "one patient's long conversations make everybody's file unreadable",
    ),
    _one(
        5, "noise-follows-manual_seed", NOISE, STREAM,
        "import torch\n\n"
        "        yield np.frombuffer(torch.randint(0, 256, (8 * size,), dtype=torch.uint8).numpy()"
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
        17, "noise-in-every-chunk", MECHANISM, SEEN,
        SEEN + "        total += noise.gaussian_on_grid(dimension, bound.norm, bound.grid)\n",
        T_CHUNKS, "the variance grows with the number of chunks",
    ),
    _one(
        17, "noise-divided-by-the-batch", MECHANISM, DRAW,
        DRAW.replace("sensitivity", "sensitivity / 5.0"), T_CHUNKS, "noise of the mean, on the sum",
    ),
    _one(
        3, "an-aborted-step-leaves-its-sum", MECHANISM, TOTAL,
        "    total = clipped_sum.__dict__.setdefault(\n"
        '        "held", torch.zeros(dimension, dtype=torch.int64)\n'
        "    )\n",
        "tests/traps/test_trap_03_aborted_step.py", "the next step holds more units than it drew",
    ),
)  # fmt: skip


SAMPLING_MUTANTS = (
    _one(
        2, "divisor-is-the-true-batch", PLAN, DONE,
        DONE.rstrip() + " * (self.divisor / max(1, n_rows))\n",
        "tests/traps/test_trap_02_size.py", "N leaks through the scale of the noise",
    ),
    _one(
        2, "rate-from-the-true-size", PLAN, POISSON,
        "sampled = sampling.poisson(n_rows, min(1.0, self.divisor / n_rows))",
        "tests/traps/test_trap_02_size.py", "q = 1/len(loader)",
    ),
    _one(
        8, "an-empty-batch-is-dropped", PLAN, DONE,
        "        if not total.any():\n            import torch\n\n"
        "            return torch.zeros(dimension)\n" + DONE,
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
    Mutant(
        25, "inclusion-beside-the-step-log", PLAN,
        (
            (POISSON, POISSON + '\n        object.__setattr__(self, "drawn", sampled)'),
            (
                "        return self._add_noise(total, log, round_)\n",
                '        log.path.with_suffix(".sampled").write_text(str(vars(self)["drawn"]))\n'
                "        return self._add_noise(total, log, round_)\n",
            ),
        ),
        (T_POST + "test_nothing_of_who_was_drawn_is_written",),
        "a file for debugging says who was drawn",
    ),
    _one(
        16, "a-missing-row-is-no-error", MECHANISM,
        "if sorted(returned) != sorted(sampled):", "if len(returned) > 10**9:",
        T_PLAN + "test_a_missing_or_doubled_unit_releases_nothing", "a step over nothing passes",
    ),
    _one(
        16, "rows-are-only-counted", MECHANISM,
        "if sorted(returned) != sorted(sampled):", "if len(returned) != len(sampled):",
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
        "of several noises in one study, only the one that reveals most is counted",
    ),
    _one(
        24, "sigma-rounded-down", ACCOUNTANT, CALIBRATED,
        CALIBRATED.replace("smallest", "(smallest - 1)"),
        T_ACCOUNTANT + "test_calibrated_noise_stays_below_the_target_and_is_tight",
        "ε a hair above the plan's",
    ),
    _one(
        29, "sigma-rounded-to-nearest", ACCOUNTANT,
        "Steps(thousandths / 1000, sampling_rate, steps, records)",
        "Steps((thousandths + 0.5) / 1000, sampling_rate, steps, records)",
        T_ACCOUNTANT + "test_calibrated_noise_stays_below_the_target_and_is_tight",
        "σ = 1.536 is chosen for ε = 8, but gives 8.0003",
    ),
    _one(
        24, "epsilon-rounded-down-in-the-report", "fedtune/core/registry/rounding.py",
        "_rounded(n, digits, decimal.ROUND_CEILING)",
        "_rounded(n, digits, decimal.ROUND_HALF_EVEN)",
        "tests/report/test_report.py::test_epsilon_is_rounded_up",
        "the ε that people read is below the one that was spent",
    ),
    Mutant(
        24, "the-line-comes-after-the-noise", MECHANISM,
        (
            ("    log_step()\n", ""),
            ("    total += " + DRAW, "    total += " + DRAW + "\n    log_step()"),
        ),
        ("tests/traps/test_trap_24_crash.py",),
        "a crash in between is free",
    ),
    _one(
        24, "a-round-again-is-free", BUDGET,
        "return max(self.remaining(), 0 if round_ is None else steps)", "return self.remaining()",
        "tests/client/test_site.py::"
        "test_a_round_from_another_adapter_is_paid_for_until_the_ceiling",
        "trained again without room for it",
    ),
    _one(
        "late", "another-dataset-ends-everybodys-study", LEDGER,
        "asks = permit if other == dataset else permit_other or permit", "asks = permit",
        T_BUDGET + "test_a_life_ends_with_its_cohort_and_no_dataset_goes_past_a_ceiling",
        "when the first patients have spent their life, nobody who arrives takes part",
    ),
    _one(
        "late", "another-datasets-ceiling-is-not-asked", LEDGER,
        "                asks([s.charge for s in spent])\n",
        "                if other == dataset:\n"
        "                    asks([s.charge for s in spent])\n",
        T_BUDGET + "test_a_life_ends_with_its_cohort_and_no_dataset_goes_past_a_ceiling",
        "a study without a last round takes another dataset past the policy's ceiling",
    ),
    _one(
        "late", "a-life-is-no-limit", SITE,
        "                budget.check(round_)\n", "                budget.check_ceilings(round_)\n",
        "tests/continuous/test_cohorts.py::"
        "test_the_plans_own_lifetime_ends_it_where_the_policy_allows_more",
        "a patient takes part past privacy.epsilon",
    ),
    _one(
        "log", "the-log-is-overwritten", "fedtune/core/files/writing.py",
        "os.O_RDWR | os.O_APPEND", "os.O_RDWR | os.O_TRUNC",
        T_PLAN + "test_epsilon_of_the_log_is_epsilon_of_the_plan", "only the last step is charged",
    ),
)  # fmt: skip

MUTANTS = (*CLIP_MUTANTS, *NOISE_MUTANTS, *SAMPLING_MUTANTS, *BUDGET_MUTANTS)
