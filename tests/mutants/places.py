"""Files and tests that seeded bugs name, and lines of code that several change."""

from __future__ import annotations

CLIP = "fedtune/core/dp/clip.py"
NOISE = "fedtune/core/dp/noise.py"
SAMPLING = "fedtune/core/dp/sampling.py"
PLAN, GRADIENTS = "fedtune/core/dp/plan.py", "fedtune/core/training/unit_gradients.py"
OPACUS = "fedtune/core/training/engines/opacus.py"
ONE_PASS = "fedtune/core/training/engines/one_pass.py"
ACCOUNTANT, STEPLOG = "fedtune/core/dp/accountant.py", "fedtune/core/dp/steplog.py"
TOKENS = "fedtune/core/data/load.py"
CACHE = "fedtune/core/models/cache.py"
LORA = "fedtune/core/models/lora.py"
NETWORK, TRAINING = "fedtune/core/models/network.py", "fedtune/core/training/local_round.py"
STATES = "fedtune/core/models/prefix_store.py"
CAUSAL, CLASSIFY = "fedtune/core/objectives/causal_lm.py", "fedtune/core/objectives/classify.py"
BUDGET, LEDGER = "fedtune/core/vault/budget.py", "fedtune/core/ledger/ledger.py"
SITE, POLICY, ANSWERS = (
    "fedtune/core/vault/worker.py",
    "fedtune/core/vault/policy.py",
    "fedtune/core/vault/answers.py",
)
ROUNDS, SUMMARY = "fedtune/server/rounds.py", "fedtune/server/summary.py"
BENEATH, T_BENEATH = "fedtune/core/files/beneath.py", "tests/test_beneath.py::"
T_BUDGET = "tests/dp/test_budget.py::"
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
GUARD = "            if gradient is None or gradient.shape[0] not in expected_lengths:\n"
RAISE = 'raise NoRowGradient("a trainable layer gave no per-record gradient")'
DONE = "        return self._add_noise(total, log, round_)\n"
MECHANISM = "fedtune/core/dp/mechanism.py"
DRAW = "noise.gaussian_on_grid(len(total), noise_multiplier * sensitivity, bound.grid)"
BOUND = "total, chunk, bound.grid, bound.norm, bound.mode, bound.gamma"
TOTAL = "    total = torch.zeros(dimension, dtype=torch.int64)\n"
SEEN = "        returned += chunk.rows\n"
POISSON = "sampled = sampling.poisson(n_rows, self.sampling_rate)"
STREAM = "yield np.frombuffer(encryptor.update(bytes(8 * size)), dtype=np.uint64)"
URANDOM = "np.frombuffer(os.urandom(8 * n_units), dtype=np.uint64)"
CHOSEN = "np.flatnonzero(draws < np.uint64(int(sampling_rate * 2.0**53))).tolist()"
NORMS = "norms: torch.Tensor = torch.linalg.vector_norm(block, dim=1)"
REPORTED = "return float(_compose_distributions(events).get_epsilon_for_delta(delta))"
CALIBRATED = "    return smallest / 1000"
GDP = """if not events:
        return 0.0
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = math.sqrt(sum(n * (q * k) ** 2 * math.expm1(1 / s**2) for s, q, n, k in events))

    def gap(e: float) -> float:
        above = norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)
        return float(above - delta)

    return float(brentq(gap, 0, 200)) if gap(0) > 0 else 0.0"""
T_CONTRACT = "tests/objectives/test_contract.py::"
T_REFERENCE = "tests/objectives/test_reference.py::"
T_ORACLES = T_CONTRACT + "test_the_four_oracles_pass"
SITES = "tests/client/test_site.py::"
CODEC = "fedtune/core/wire/codec.py"
T_CODEC, T_LIES = "tests/wire/test_codec.py::", "tests/wire/test_hostile.py::"
SEALS = "tests/server/test_apps.py::"
TEAM = "fedtune/core/training/data_parallel.py"
PART = "        counted_sum[:dimension] = partial\n"
LABEL = "fedtune/derive/preferences.py"
BUDGETS, MERGE = "fedtune/accounting/composed_epsilon.py", "fedtune/derive/merge_methods.py"
T_BUDGETS, T_MERGE = "tests/test_budgets.py::", "tests/models/test_merge.py::"
ARRIVALS, CONTINUOUS = "fedtune/core/ledger/cohorts.py", "fedtune/server/continuous.py"
T_ARRIVALS, T_COHORTS = "tests/dp/test_arrivals.py::", "tests/continuous/test_cohorts.py::"
T_VERSIONS = "tests/continuous/test_versions.py::"
CHANGE_PLAN, PAIRED = "fedtune/report/change_plan.py", "fedtune/report/paired.py"
VERDICTS = "fedtune/evidence/versions.py"
T_LOOKS, T_VERDICTS = "tests/continuous/test_looks.py::", "tests/continuous/test_verdicts.py::"
VIDEO, T_CLIPS = "fedtune/core/data/video.py", "tests/data/test_video_bounds.py::"
MEDIA, PARTS = "fedtune/core/data/media.py", "fedtune/core/bases/architecture.py"
T_FILES = "tests/data/test_media.py::"
T_SEEN, T_TILES = "tests/models/test_media.py::", "tests/dp/test_media.py::"
T_RANKS, T_NARROW = "tests/test_lora_ranks.py::", "tests/server/test_narrow_updates.py::"
