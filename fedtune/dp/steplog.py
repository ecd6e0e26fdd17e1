"""Write and read the step log: one line per noised step, append-only, kept at the site."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from fedtune.dp.accountant import Steps
from fedtune.errors import InfrastructureError


@dataclass(frozen=True)
class Step:
    """One noised step's parameters. Every value is public: it follows from the plan and the
    declared size, never from the data."""

    study: str  # plan digest
    round: int
    noise_multiplier: float  # σ, in multiples of C
    sampling_rate: float
    max_grad_norm: float
    unit: str
    records: int = 1  # k: the most rows of one unit


class StepLog:
    """A JSONL file of `Step`. Guarantee: a line is on disk before its noised sum exists anywhere
    else, so a crash can only over-report what was spent.

    Errors: InfrastructureError when the file cannot be written or a line cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: Step) -> None:
        line = json.dumps(asdict(step), sort_keys=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InfrastructureError(
                f"{self.path}: the step log cannot be written ({error.strerror})",
                todo="free the disk or fix the permissions; no step runs without its line",
            ) from None

    def steps(self, study: str | None = None) -> list[Step]:
        """Read all steps, or those of one plan digest, in order."""
        if not self.path.exists():
            return []
        steps = []
        for number, line in enumerate(self.path.read_text().splitlines(), 1):
            try:
                steps.append(Step(**json.loads(line)))
            except (ValueError, TypeError):
                raise InfrastructureError(
                    f"{self.path}: line {number} is not a step",
                    todo="restore the file from a backup; without it no budget can be stated",
                ) from None
        return [step for step in steps if study in (None, step.study)]


def events(steps: list[Step]) -> list[Steps]:
    """Count equal steps of a log as events for the accountant."""
    counts = Counter((s.noise_multiplier, s.sampling_rate, s.records) for s in steps)
    return [Steps(sigma, rate, count, records) for (sigma, rate, records), count in counts.items()]
