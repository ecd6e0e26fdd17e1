"""Write and read the step log: a site's append-only file of the steps that ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.core.dp.accountant import Steps
from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import append_line
from fedtune.core.files.writing import replace as replace_file


@dataclass(frozen=True)
class Step:
    """One step as the step log has it. Every value is public: the plan and the declared size
    determine it, never the data. noise_multiplier is 0 for a step without noise."""

    study: str  # plan digest
    round: int
    noise_multiplier: float  # σ, in multiples of C
    sampling_rate: float
    max_grad_norm: float
    unit: str
    records: int = 1  # k: the most rows of one unit
    # Which of a hospital's memberships (its part in one consortium) ran the step; "" if the site
    # did not share a ledger with other memberships of a hospital, or did not yet.
    membership: str = ""


@dataclass(frozen=True)
class Attempt:
    """What one line of the step log states: an attempt at a round.

    - step: one of its steps, which are all equal
    - steps: how many there are
    - entry: the hash of the ledger's entry that charged the attempt; "" if the line does not say
      it, as a line of an older release
    - order: the Rényi order of that charge; None if the line does not say it"""

    step: Step
    steps: int
    entry: str = ""
    order: float | None = None


class StepLog:
    """The step log of a site: a JSONL file of `Step`.

    Guarantee: a step's line is complete and on disk before the noised sum of that step exists
    anywhere else, so after a crash the log can only state more steps than were released, never
    fewer. Bytes after the last newline, left by a crash or a full disk, are no step: no step ran,
    and the next line replaces them.

    All steps of a round share one line, which is written before the first step. So a full disk lets
    no step of the round run, and the number of lines does not grow with the number of steps. Each
    attempt at a round (`begin_round`) has a line of its own.

    membership: the hospital's membership in a consortium that appends to this log; "" if there is
    none. Each line names its membership, since two memberships may run the same plan.

    Errors: InfrastructureError when the file cannot be written or a line cannot be read."""

    def __init__(self, path: Path, membership: str = "") -> None:
        self.path, self._membership = path, membership
        self._round: Step | None = None  # the step that the last line states
        self._ahead = 0  # how many of that line's steps have yet to run
        self._charged: dict[str, Any] = {}  # what the next line says of the ledger's entry

    def begin_round(self, entry: str = "", order: float | None = None) -> None:
        """Begin an attempt at a round. One line of the log stands for all steps of an attempt, so
        the next step writes a new line, even if an earlier attempt at this round broke off after
        some of its steps.

        - entry: the hash of the ledger's entry that charged the attempt. By it a restored ledger
          knows whether it has the charge
        - order: the Rényi order of that charge, at which a restore charges it again"""
        self._round = None
        stated = {"entry": entry or None, "order": order}
        self._charged = {name: value for name, value in stated.items() if value is not None}

    def append(self, step: Step, of_round: int = 1) -> None:
        """Log one of the steps of a round. Only the first of them writes a line, which stands for
        all. of_round: how many steps the round has; all are equal."""
        step = replace(step, membership=self._membership)
        if step == self._round and self._ahead:
            self._ahead -= 1
            return
        counted = asdict(step) | ({"steps": of_round} if of_round > 1 else {})
        counted |= self._charged
        if not step.membership:
            del counted["membership"]
        line = json.dumps(counted, sort_keys=True)
        try:
            append_line(self.path, line.encode())
        except OSError as error:
            raise InfrastructureError(
                f"{self.path}: the step log cannot be written ({error.strerror})",
                todo="free disk space or fix the permissions; no step runs unless it is logged",
            ) from None
        self._round, self._ahead = step, of_round - 1

    def join(self, other: Path) -> None:
        """Append the lines of another step log to this one, as lines of this membership. If the
        lines that this membership already has here are the first lines of `other`, only the lines
        after them are appended; so after a second call with the same log, which may have grown, no
        line is here twice. If they are not its first lines, all lines of `other` are appended.
        Errors: InfrastructureError."""
        lines = [self._named(line) for line in _whole_lines(other)]
        there = _whole_lines(self.path)
        own = [line for line in there if self._named(line) == line]
        missing = lines[len(own) :] if own == lines[: len(own)] else lines
        if missing:
            content = "".join(f"{line}\n" for line in (*there, *missing))
            replace_file(self.path, content.encode(), private=True)

    def _named(self, line: str) -> str:
        """Return a line of the log with this membership's name added. A line that cannot be read as
        a step is returned unchanged, so that `steps` raises an error for it."""
        try:
            return json.dumps({**json.loads(line), "membership": self._membership}, sort_keys=True)
        except (ValueError, TypeError):
            return line

    def steps(
        self, study: str | None = None, memberships: Collection[str] | None = None
    ) -> list[Step]:
        """Return all steps of the log, in order. A round that was interrupted counts with all its
        planned steps.

        - study: the digest of the only plan whose steps are returned; None: of all plans
        - memberships: the only memberships whose steps are returned; None: of all

        Errors: InfrastructureError if a line is no step."""
        lines = [line for line in self.attempts(memberships) if study in (None, line.step.study)]
        return [line.step for line in lines for _ in range(line.steps)]

    def count_steps(self, memberships: Collection[str] | None = None) -> Counter[Step]:
        """Count the steps of the log, equal ones together. The arguments and errors are those of
        `steps`, which takes room and time for each of them."""
        total = Counter[Step]()
        for line in self.attempts(memberships):
            total[line.step] += line.steps
        return total

    def attempts(self, memberships: Collection[str] | None = None) -> Iterator[Attempt]:
        """Yield what each line of the log states, in order. memberships: the only memberships whose
        lines are taken; None: of all. Errors: InfrastructureError if a line is no step."""
        for number, line in enumerate(_whole_lines(self.path), 1):
            if (attempt := _read_line(line)) is None:
                raise InfrastructureError(
                    f"{self.path}: line {number} is not a step",
                    todo="restore the file from a backup; without it no budget can be stated",
                )
            if memberships is None or attempt.step.membership in memberships:
                yield attempt

    def list_readable(self) -> list[Attempt]:
        """Return what each line of the log states that can be read, in order, also after a line
        that cannot. This is for a restore, which charges for what is left of a damaged log."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = content.rpartition(b"\n")[0].decode(errors="replace").splitlines()
        return [attempt for attempt in map(_read_line, lines) if attempt]


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def _read_line(line: str) -> Attempt | None:
    """Return what a line of the log states; None if it is no step."""
    try:
        logged = json.loads(line)
        count, entry = _check_count(logged.pop("steps", 1)), str(logged.pop("entry", ""))
        order = logged.pop("order", None)
        return Attempt(Step(**logged), count, entry, None if order is None else float(order))
    except (AttributeError, ValueError, TypeError, RecursionError):
        return None


def _check_count(count: object) -> int:
    if type(count) is not int or count < 1:
        raise ValueError("a line's number of steps is not a whole number of at least 1")
    return count


def events(steps: list[Step]) -> list[Steps]:
    """Return the steps of a log in the form in which the accountant counts them: for each kind of
    step (σ, q and k), one `Steps` with the number of such steps."""
    counts = Counter((s.noise_multiplier, s.sampling_rate, s.records) for s in steps)
    return [Steps(sigma, rate, count, records) for (sigma, rate, records), count in counts.items()]
