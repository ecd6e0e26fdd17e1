"""Store a site's training loss by round in a separate file: losses.jsonl in the state folder
(0600).

The loss is private: no ε covers it. It is in no message, log, status, metric or ledger, and a
failure to write it is not reported. `fedtune dashboard` draws it for the site's people, and
`fedtune purge` deletes it. The length of a line does not depend on the loss, and a line is written
whether or not a record was drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedtune.core.config import Site, Study
from fedtune.core.config.state_files import LOSSES
from fedtune.core.files.writing import append_line
from fedtune.core.training.round_loss import RoundLoss


@contextmanager
def kept(site: Site, study: Study, round_: int) -> Iterator[RoundLoss]:
    """A context manager: yield the object to which the round `round_` adds its records' losses, and
    store their mean in the site's losses.jsonl when the block ends. If the disk refuses the file,
    nothing is stored and no error is raised."""
    losses = RoundLoss()
    yield losses
    with suppress(OSError):
        site.site.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = line(study, round_, losses.mean).encode()
        append_line(site.site.state / LOSSES, written, durably=False)  # nothing depends on it


def line(study: Study, round_: int, mean: float | None) -> str:
    """Format a round's line of losses.jsonl, without a newline. The line is of the same length
    whatever the loss is. mean: the mean loss; None, or a number that is not finite, is written as
    null."""
    is_known = mean is not None and math.isfinite(mean)
    loss = f"{mean:.5e}" if is_known else "null"
    public = json.dumps({"plan": study.digest, "study": study.study.name, "round": round_})
    return f'{public[:-1]}, "loss": {loss:>13}}}'
