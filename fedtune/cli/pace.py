"""Estimate the time that the rest of a step, or of a study's rounds, will take."""

from __future__ import annotations

from fedtune.core.progress import Step

SOONEST = 10.0  # seconds of a step before its pace is known


class StepPace:
    """The pace of the running step: the amount of work that the step has done since its first
    report, and the time that this took."""

    def __init__(self) -> None:
        self._text = ""
        self._first = 0
        self._done = 0
        self._began = 0.0

    def estimate_remaining(self, step: Step, now: float) -> float | None:
        """Return the seconds that the rest of `step` takes at its pace so far; None while the
        pace is unknown or if nothing is left. now: seconds on any clock."""
        if step.text != self._text or step.done < self._done:
            self._text = step.text
            self._first = step.done
            self._began = now
        self._done = step.done
        worked, seconds = step.done - self._first, now - self._began
        if seconds < SOONEST or worked <= 0 or step.done >= step.total:
            return None
        return seconds / worked * (step.total - step.done)


class RoundsPace:
    """The pace of a study's rounds. The first round in this process also computes the frozen
    layers' outputs for all records, which later rounds reuse; that time is not counted. In each
    method, `now` is in seconds on any clock."""

    def __init__(self) -> None:
        self._began: float | None = None  # when the first timed round began
        self._timed, self._known = 0, False  # _known: whether one-off work is over or reported
        self._once, self._once_since = 0.0, 0.0  # seconds of one-off work; when it began

    def begin(self, now: float) -> None:
        """Note that a round begins; the time between two rounds counts for the later one."""
        if self._began is None:
            self._began = now

    def hear(self, step: Step, now: float) -> None:
        """Note a report of a long step, to measure the work that is done only once in a study
        (step.once). Reports of other steps are ignored."""
        if not step.once or self._began is None:
            return
        if step.done == 0:
            self._once_since = now
        elif step.done == step.total:
            self._once, self._known = self._once + now - self._once_since, True

    def end_round(self, left: int, now: float) -> float | None:
        """Note that a round has ended. Return the seconds that the `left` remaining rounds take at
        the average time so far; None if none is left.

        The result is None after the first round too, because of the one-off work in it, unless
        `hear` has measured that work. It can do so only if the sites work in this process."""
        if self._began is None:
            return None
        if not self._known:
            self._began, self._known = now, True
            return None
        self._timed += 1
        return (now - self._began - self._once) / self._timed * left or None
