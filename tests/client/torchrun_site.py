"""What torchrun starts in a test: rank 0 trains a round of a study, the other shares its steps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.numpy import save_file

from fedtune.core.vault.rank_process import follow_torchrun, team
from fedtune.core.vault.worker import worker
from tests.client.test_ranks import two_steps


def main(site: Path, base: Path, out: Path) -> None:
    if os.environ["RANK"] != "0":
        return follow_torchrun(site)
    made, here = two_steps(base), worker(str(site))
    here.prepare(made.study, made.frozen)
    with team(site, 1):
        assert here.ranks is not None and here.ranks.size == 2
        save_file(here.train(made.study.digest, 1, made.adapter).delta, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
