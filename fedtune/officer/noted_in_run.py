"""Find the newest head of a site's audit log that a run, or its dossier, holds in encrypted
form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files import reading
from fedtune.core.ledger.files import KEY, opened_token
from fedtune.core.wire.keys import SigningKey
from fedtune.evidence.sign import EVIDENCE, RUN


def noted_in(run: Path, state: Path, memberships: Iterable[str] = ("",)) -> str:
    """Return the newest head (NUMBER:HASH, of the newest entry) of a site's audit log that a run
    holds. Each update of the site carries the head that the log had when the update was made,
    encrypted for the site.

    - run: the folder of the run, or of its dossier
    - state: the folder of the ledger, where the key is
    - memberships: the names of the memberships that share the ledger; "" stands for a site with a
      ledger of its own

    Errors: ConfigError if the key is missing; InputError if `run` holds no such head, or is no run.
    """
    if not (state / KEY).exists():
        raise ConfigError(f"{state}: no {KEY} here", "a site's state folder")
    key = SigningKey.at(state / KEY)
    where = run / RUN if (run / RUN / EVIDENCE).exists() else run
    evidence = reading.json_in(where / EVIDENCE, "what sites signed of a run", most=reading.LARGE)
    heads = set[str]()
    for update in evidence.get("updates", ()):
        try:
            token = json.loads(update["header"])["ledger"]["token"]
            heads.add(str(opened_token(key, token, *memberships).get("audit", "")))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    if not (known := heads - {""}):
        raise InputError(
            f"{run}: no update in it is from this site and holds a head of the site's audit log",
            "a run to which this site sent updates",
        )
    return max(known, key=lambda head: int(head.partition(":")[0]))
