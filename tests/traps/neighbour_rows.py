"""BASE COUNTS: every objective's rows, beside COUNTS other rows in any order, bit by bit; with as
many threads as OMP_NUM_THREADS says. Prints what differs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedtune.core.models.tiny import generate_records
from tests.objectives.test_contract import ADAPTERS, NAMES, case_of, suits

SIZES = [1] * 28 + [2, 3] * 6


def differing(base: Path, counts: list[int], names: Sequence[str] = NAMES) -> list[str]:
    draw, found = np.random.default_rng(0), []
    for name in names:
        for adapter in (adapter for adapter in ADAPTERS if suits(name, adapter)):
            for wanted in ("auto", "opacus"):
                case = case_of(base, name, adapter, wanted=wanted)  # type: ignore[arg-type]
                engine = case.engine(generate_records(case.study, case.network, SIZES))
                every = engine.matrix(range(engine.n_rows))
                for count in counts:
                    some = draw.permutation(engine.n_rows)[: count + 1].tolist()
                    if not torch.equal(engine.matrix(some), every[some]):
                        found.append(f"{name}, {adapter}, {wanted}: beside {count}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # also where there are fewer cores
    for line in differing(Path(sys.argv[1]), [int(n) for n in sys.argv[2].split(",")]):
        print(line)
