"""Compute lower bounds on ε from an attacker's error counts."""

from __future__ import annotations

import math

from scipy.special import log_ndtr, ndtri  # type: ignore[import-untyped]
from scipy.stats import beta, binom  # type: ignore[import-untyped]


def rate_upper(errors: int, trials: int, confidence: float) -> float:
    """Compute the one-sided Clopper–Pearson upper bound on an error rate.

    errors: how many of `trials` independent trials were errors. confidence: the probability that
    the bound is at least the true rate, such as 0.95.

    Errors: ValueError if there is no trial, or more errors than trials."""
    if not 0 <= errors <= trials or trials < 1:
        raise ValueError("errors must be between 0 and the number of trials")
    if errors == trials:
        return 1.0
    return float(beta.ppf(confidence, errors + 1, trials - errors))


def gaussian_mu(false_alarms: int, misses: int, trials: int, confidence: float) -> float:
    """Compute a lower bound on μ, at least 0, from the two error counts of a test. μ is sensitivity
    / standard deviation: how far apart a Gaussian mechanism keeps two neighbouring data sets.

    - false_alarms: in how many of the trials without the audited unit the test said that it was
      there
    - misses: in how many of the trials with the unit the test said that it was not there
    - trials: the number of trials without the unit, and as many with it
    - confidence: the probability that the bound is at most the true μ, such as 0.95

    With rates α of false alarms and β of misses, β ≥ Φ(Φ⁻¹(1-α) - μ), so μ ≥ -Φ⁻¹(α) - Φ⁻¹(β). Each
    error rate is bounded with error probability (1 - confidence) / 2.
    Errors: ValueError if there is no trial, or more errors than trials.
    Reference: Dong, Roth & Su 2022, definition 2.6; Nasr et al. 2023, section 4."""
    half = 1 - (1 - confidence) / 2
    alpha = rate_upper(false_alarms, trials, half)
    missed = rate_upper(misses, trials, half)
    return max(0.0, float(-ndtri(alpha) - ndtri(missed)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Compute the exact ε at δ of a Gaussian mechanism with μ = sensitivity / standard deviation;
    0.0 if μ = 0, or if the mechanism is (0, δ)-DP already.

    Reference: Balle & Wang 2018, theorem 8."""
    if mu <= 0 or _delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(high, mu) > delta:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return low


def _delta(epsilon: float, mu: float) -> float:
    first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
    return first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))


def one_run_epsilon(m: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Compute a lower bound on ε from a single run, in which `correct` of `guesses` guesses about m
    independent fair coins were right; 0.0 if random guessing explains that.

    - m: the number of coins; each decided whether one canary was in the run
    - guesses: the number of coins that the attacker guessed; it may leave out the others
    - correct: how many of these guesses were right
    - delta: the δ at which ε is bounded
    - confidence: the probability that the bound is at most the true ε, such as 0.95

    Errors: ValueError unless correct ≤ guesses ≤ m.
    Reference: Steinke, Nasr & Jagielski 2023, theorem 5.2 and appendix D."""
    if not 0 <= correct <= guesses <= m:
        raise ValueError("correct must be at most guesses, and guesses at most m")
    significance = 1 - confidence
    if _one_run_p(m, guesses, correct, 0.0, delta) >= significance:
        return 0.0
    low, high = 0.0, 1.0
    while _one_run_p(m, guesses, correct, high, delta) < significance:
        low, high = high, high + 1
    for _ in range(40):
        middle = (low + high) / 2
        rejected = _one_run_p(m, guesses, correct, middle, delta) < significance
        low, high = (middle, high) if rejected else (low, middle)
    return low


def _one_run_p(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return an upper bound on a p-value: the largest probability, if the run was (ε, δ)-DP, that
    at least `correct` of the guesses are right.

    - m: the number of coins, each of which decided whether one canary was in the run
    - guesses: how many of the coins were guessed
    - correct: how many of these guesses were right
    - epsilon, delta: the privacy that is assumed"""
    p_correct = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, p_correct))
    mass = steepest = 0.0
    masses = binom.pmf(range(correct), guesses, p_correct)
    for back in range(1, correct + 1):
        mass += float(masses[correct - back])
        steepest = max(steepest, mass / back)
    return min(1.0, tail + 2 * m * delta * steepest)
