"""Run DP-SGD steps: draw rows, clip and sum their gradients, and add noise. This is the one module
that combines sampler, clipped sum, noise and accountant.

As in google-deepmind/jax_privacy's execution plan, the same immutable object computes ε and runs
the steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fedtune.core.config import Study
from fedtune.core.dp import accountant, clip, mechanism, sampling, shared_noise
from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.calibration import resolve
from fedtune.core.dp.mechanism import Bound, RowGradients
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import describe, is_fault

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("fedtune.dp")


class StepPlan(Protocol):
    """The methods of a plan that training calls. The plan may be private (DpPlan, SitePlan) or not
    (NonPrivatePlan)."""

    def step(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Draw rows, sum their gradients, divide the sum by the plan's divisor, and return the
        result, fp32 (dimension,). If the plan is private, the sum is noised.

        - n_rows: how many rows the dataset has; a row is a unit or, if records are drawn, a record
        - dimension: the number of coordinates of a row's gradient
        - gradients: called with the indices of the drawn rows; yields the gradient of each exactly
          once, some at a time. The tensors may be overwritten
        - log: the site's step log, to which a private step is written before there is a result
        - round_: the number of the round, for the step's line"""
        ...

    def noised_sum(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Draw rows, and return the sum of their clipped gradients in multiples of the plan's grid
        (`grid_at(dimension)`), int64 (dimension,). If the plan is private, the sum is noised.

        - n_rows: how many rows the dataset has
        - dimension: the number of coordinates of a row's gradient, and of the sum
        - gradients: called with the indices of the drawn rows; yields the gradient of each exactly
          once. The tensors are overwritten
        - log: the site's step log, to which a private step is written before there is a result
        - round_: the number of the round, for the step's line"""
        ...


@dataclass(frozen=True)
class DpPlan:
    """One site's part of a private study: it runs the noised steps, and computes what they cost.

    - study: the digest of the plan
    - unit: whom the ε protects
    - sampling_rate: q, the probability with which each row is drawn for a step
    - noise_multiplier: σ in multiples of C
    - max_grad_norm: C, the bound on one row
    - clipping, gamma: how a row is clipped (`clip.scales`)
    - rounds, local_steps: the number of rounds, and of the steps in each round; `steps`: of all
      steps together
    - delta: δ of the whole study
    - divisor: the constant expected batch q · k · declared size, never the true count
    - records: k, the most rows of one unit (1 where units are drawn)
    - lifetime: in a study without a last round, the ε that no unit exceeds; `rounds` and `steps`
      are then the most in which one unit takes part. Else None
    - sites, colluding: n and t of secure aggregation; without it 1 and 0. This site adds noise of
      σ/√(n - t); σ and ε are those of the sum that is opened, to which n - t honest sites added
      noise

    Guarantee, for adding or removing one unit: each call of `step` is a Gaussian mechanism on the
    clipped sum. A unit has k rows in it, each drawn with probability q: for k = 1 this is the
    Poisson-sampled Gaussian (σ, q), for k > 1 the mixture with Binomial(k, q) of the unit's rows. A
    step's line is in the log before its result is returned.
    Reference: Charles et al. 2024, "Fine-tuning large language models with user-level differential
    privacy", algorithms 1 (records drawn: sensitivity kC) and 2 (units drawn: sensitivity C)."""

    study: str
    unit: Literal["record", "patient"]
    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float
    clipping: Literal["flat", "normalised"]
    gamma: float
    rounds: int
    local_steps: int
    delta: float
    divisor: float
    records: int = 1
    lifetime: float | None = None
    sites: int = 1
    colluding: int = 0

    @property
    def steps(self) -> int:
        return self.rounds * self.local_steps

    @property
    def epsilon(self) -> float:
        """The ε that the whole plan costs, i.e. all of its steps."""
        return accountant.epsilon(self.events(self.steps), self.delta)

    def events(self, steps: int) -> list[Steps]:
        """Return `steps` steps of this plan in the form in which the accountant counts them: a list
        of one `Steps`. Its σ is that of the sum which is opened: with secure aggregation the noise
        of all honest sites, else this site's own."""
        sigma = shared_noise.joint_sigma(self.own_noise, self.sites - self.colluding)
        return [Steps(sigma, self.sampling_rate, steps, self.records)]

    @property
    def own_noise(self) -> float:
        """The σ of the noise that this site itself adds, in multiples of C."""
        return shared_noise.own_sigma(self.noise_multiplier, self.sites - self.colluding)

    @property
    def fallback_epsilon(self) -> float:
        """The ε that the whole plan costs if only this site's own noise is counted, whatever other
        sites do."""
        return accountant.epsilon(self.fallback_events(self.steps), self.delta)

    def fallback_events(self, steps: int) -> list[Steps]:
        """Return `steps` steps of this plan in the form in which the accountant counts them, a list
        of one `Steps`, with the σ of this site's own noise alone. The fallback ε is computed from
        it."""
        return [Steps(self.own_noise, self.sampling_rate, steps, self.records)]

    def step(
        self,
        n_rows: int,
        dimension: int,
        gradients: RowGradients,
        log: StepLog,
        round_: int,
        team: Team | None = None,
    ) -> torch.Tensor:
        """Run one DP-SGD step: draw rows, and return the noised sum of their clipped gradients,
        divided by `divisor`, fp32 (dimension,). If no row is drawn, the result is noise alone.

        - n_rows: how many rows the dataset has; a row is a unit or, if records are drawn, a record
        - dimension: the number of coordinates of a row's gradient
        - gradients: called with the indices of the sampled rows; yields the gradient of each
          exactly once. Its tensors are zeroed after use. (A SitePlan calls it again for rows that
          could not be summed together.)
        - log: the site's step log, to which the step's line is written
        - round_: the number of the round in that line
        - team: other processes that sum some of the rows; sampling and noise happen only in this
          process, once. None: this process sums all rows

        Errors: RuntimeError if a row is missing or doubled; InfrastructureError if the log cannot
        be written. Nothing is released then."""
        total = self._drawn_sum(n_rows, dimension, gradients, team)
        return self._add_noise(total, log, round_)

    def noised_sum(
        self,
        n_rows: int,
        dimension: int,
        gradients: RowGradients,
        log: StepLog,
        round_: int,
        team: Team | None = None,
    ) -> torch.Tensor:
        """Run one step as `step` does, but return the noised sum in multiples of
        `grid_at(dimension)`, int64 (dimension,).

        - n_rows: how many rows the dataset has
        - dimension: the number of coordinates of a row's gradient, and of the sum
        - gradients: called with the indices of the sampled rows; yields the gradient of each
          exactly once. Its tensors are zeroed after use
        - log: the site's step log, to which the step's line is written
        - round_: the number of the round in that line
        - team: other processes that sum some of the rows; None: this process sums all rows

        Errors: as for `step`.
        Guarantee: one site's result alone is a sampled Gaussian mechanism with noise multiplier
        own_noise and sampling rate q. The sum over `sites` such sites has noise_multiplier and q,
        even if `colluding` of them reveal their own noise."""
        return self._add_noise_to(self._drawn_sum(n_rows, dimension, gradients, team), log, round_)

    def _drawn_sum(
        self, n_rows: int, dimension: int, gradients: RowGradients, team: Team | None
    ) -> torch.Tensor:
        """Draw rows, and return the sum of their clipped gradients, to which no noise is added yet:
        int64 (dimension,), in multiples of `grid_at(dimension)`. Arguments as for `step`."""
        sampled = sampling.poisson(n_rows, self.sampling_rate)
        if team is None:
            return self.clipped_sum(sampled, dimension, gradients)
        partial = lambda rows: self.clipped_sum(rows, dimension, gradients)  # noqa: E731
        return team.total(sampled, dimension, partial)

    @property
    def grid(self) -> float:
        """The grid of a site's sum without secure aggregation: the number, in gradient units, to
        whose multiples the sum is rounded."""
        return clip.grid_for(self.noise_multiplier * self.max_grad_norm)

    def grid_at(self, dimension: int) -> float:
        """Return the grid, in gradient units, of a sum with `dimension` numbers, with or without
        secure aggregation. The sum counts multiples of it."""
        if self.sites == 1:
            return self.grid
        return shared_noise.grid(self.own_noise * self.max_grad_norm, self.max_grad_norm, dimension)

    def clipped_sum(
        self, sampled: list[int], dimension: int, gradients: RowGradients
    ) -> torch.Tensor:
        """Clip the gradients of rows, and return their sum in multiples of this plan's grid, int64
        (dimension,), without noise.

        - sampled: the indices of the rows
        - dimension: the number of coordinates of a row's gradient
        - gradients: called once with `sampled`; yields the gradient of each row exactly once"""
        return mechanism.clipped_sum(gradients, sampled, dimension, self._bound_at(dimension))

    def _bound_at(self, dimension: int) -> Bound:
        return Bound(self.max_grad_norm, self.clipping, self.gamma, self.grid_at(dimension))

    def _add_noise(self, total: torch.Tensor, log: StepLog, round_: int) -> torch.Tensor:
        noised = self._add_noise_to(total, log, round_)
        return (noised.double() * (self.grid_at(len(total)) / self.divisor)).float()

    def _add_noise_to(self, total: torch.Tensor, log: StepLog, round_: int) -> torch.Tensor:
        """Write a step to the log, add its noise to the clipped sum `total` in place, and return
        `total`.

        - total: the sum, in multiples of the plan's grid
        - log: the site's step log
        - round_: the number of the round, for the step's line"""

        def log_step() -> None:
            line = Step(
                study=self.study,
                round=round_,
                noise_multiplier=self.own_noise,
                sampling_rate=self.sampling_rate,
                max_grad_norm=self.max_grad_norm,
                unit=self.unit,
                records=self.records,
            )
            log.append(line, of_round=self.local_steps)

        bound = self._bound_at(len(total))
        return mechanism.noised_sum(total, bound, self.own_noise, log_step)


@dataclass(frozen=True)
class SitePlan:
    """A private plan as a site's round runs it: no failure of one unit's rows ends a step.

    - plan: the plan whose steps are run
    - team: other processes that sum some of the rows; None if there are none
    - make_room: a function that gets the error of a failed sum, and frees what memory it can

    Guarantee: if rows cannot be summed together, for whatever reason, each is summed alone, and
    only a row that fails alone is left out. So one unit never decides whether others are in the
    sum. The step costs the same ε, and a failed sum raises no error, since an error would reveal
    something about the records. The reason is in this machine's own log."""

    plan: DpPlan
    team: Team | None = None
    make_room: Callable[[BaseException], None] | None = None

    def step(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Run one step as DpPlan.step does, and return the noised sum of the drawn rows' clipped
        gradients, divided by the plan's divisor, fp32 (dimension,). If the rows cannot be summed
        together, they are summed one by one. Arguments as for DpPlan.step."""
        return self.plan.step(n_rows, dimension, gradients, log, round_, self)

    def noised_sum(
        self, n_rows: int, dimension: int, gradients: RowGradients, log: StepLog, round_: int
    ) -> torch.Tensor:
        """Run one step as DpPlan.noised_sum does, and return the noised sum in multiples of the
        plan's grid, int64 (dimension,). If the rows cannot be summed together, they are summed one
        by one. Arguments as for DpPlan.noised_sum."""
        return self.plan.noised_sum(n_rows, dimension, gradients, log, round_, self)

    def total(self, sampled: list[int], dimension: int, clipped_sum: ClippedSum) -> torch.Tensor:
        """Return the sum of the clipped rows `sampled`, int64 (dimension,), without noise. The work
        is shared with the other processes (`team`), if there are any; if they fail, this process
        sums all rows. clipped_sum: the function that sums the rows whose indices it gets."""

        def sum_rows(rows: list[int]) -> torch.Tensor:
            return self._together_or_alone(rows, dimension, clipped_sum)

        if self.team is not None:
            try:
                return self.team.total(sampled, dimension, sum_rows)
            except BaseException as error:
                if not is_fault(error):
                    raise
                _log.error("the other processes did not sum a step (%s)", describe(error))
                self._free_after(error)
        return sum_rows(sampled)

    def _together_or_alone(
        self, rows: list[int], dimension: int, clipped_sum: ClippedSum
    ) -> torch.Tensor:
        """Return the sum of the clipped `rows`, int64 (dimension,). They are summed together or, if
        that fails, one by one; a row that also fails alone is left out. Both ways give the same
        integers, since each row is clipped and rounded by itself. clipped_sum: the function that
        sums the rows whose indices it gets."""
        import torch

        try:
            return clipped_sum(rows)
        except BaseException as error:
            if not is_fault(error):
                raise
            _log.error("rows could not be summed together (%s); now one by one", describe(error))
            self._free_after(error)
        added = torch.zeros(dimension, dtype=torch.int64)
        for row in rows:
            try:
                alone = clipped_sum([row])
            except BaseException as error:
                if not is_fault(error):
                    raise
                _log.error("a row was not summed (%s); it takes no part", describe(error))
                self._free_after(error)
            else:
                added += alone
                alone.zero_()
        return added

    def _free_after(self, error: BaseException) -> None:
        if self.make_room is not None:
            self.make_room(error)


def plan_for_site(study: Study, declared_size: int, most: int | None = None) -> DpPlan:
    """Build the plan of a site with `declared_size` units (public) for a private study. most: the
    largest number of steps that is tried; None: accountant.MOST.

    Errors: ConfigError if the study is not private, not even one round fits the budget, or more
    than `most` steps fit it."""
    calibration = resolve(study, declared_size, most)
    privacy = study.privacy
    clipping = study.clipping
    secure = study.secure_aggregation
    assert not isinstance(privacy, str) and clipping is not None  # checked by resolve and Study
    return DpPlan(
        study=study.digest,
        unit=privacy.unit,
        sampling_rate=calibration.sampling_rate,
        noise_multiplier=calibration.noise_multiplier,
        max_grad_norm=clipping.max_grad_norm,
        clipping=clipping.mode,
        gamma=clipping.gamma,
        rounds=calibration.rounds,
        local_steps=study.training.local_steps,
        delta=privacy.delta,
        divisor=calibration.sampling_rate * study.records_per_draw * declared_size,
        records=study.records_per_draw,
        lifetime=privacy.epsilon if study.continuous else None,
        sites=study.strategy.min_sites if secure else 1,
        colluding=secure.colluding if secure else 0,
    )


ClippedSum = Callable[[list[int]], "torch.Tensor"]  # rows -> their clipped sum, int64 (d,)


class Team(Protocol):
    """The other processes of a site that sum some of a step's rows."""

    def total(self, sampled: list[int], dimension: int, clipped_sum: ClippedSum) -> torch.Tensor:
        """Return the sum of the clipped rows `sampled`, int64 (dimension,), over all processes.
        clipped_sum: the function by which this process sums its share of the rows, whose indices it
        gets.

        Guarantee: each of `sampled` is in the sum exactly once, else nothing is returned.
        Errors: InfrastructureError where another process failed; those of `clipped_sum`."""
        ...
