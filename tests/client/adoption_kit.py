"""Sites with a ledger of their own that become memberships, and what they have spent by hand."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.optimize import brentq
from scipy.stats import norm

from fedtune.core.config import load_site
from fedtune.core.data.identity import identities
from fedtune.core.data.records import unit_member
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.officer.withdraw import withdraw

DELTA = 1e-3  # policy.max_delta
SITE = """\
# a person's comment
[site]
name = "{name}"
declared_size = 12
state = "{name}-state"
[data]   # the notes
path = "{path}"
name = "{dataset}"
{more}
columns = {{ prompt = "note", completion = "answer", patient = "who" }}
[policy]
bases = "any"
"""
CHARGE = Charge("", "a study", 0, 8.0, 1.0, 2, 1, 1.0, "patient", "first", 8.0)


def write_notes(path: Path, patients: Sequence[str]) -> Path:
    rows = [{"who": who, "note": f"fever of {who}", "answer": "yes"} for who in patients]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_site(
    folder: Path, name: str, path: str = "notes.jsonl", dataset: str = "records", more: str = ""
) -> Path:
    file = folder / f"{name}.toml"
    file.write_text(SITE.format(name=name, path=path, dataset=dataset, more=more))
    return file


def spend(file: Path, rounds: int, sigma: float = 8.0, withdrawn: Sequence[str] = ()) -> Ledger:
    """Pay for a study as a client does: declared members, steps, charges and released updates."""
    site = load_site(file)
    ledger, log = Ledger(site.home), StepLog(site.home / "steps.jsonl")
    data, study = site.data, "sha256:" + f"{rounds:02x}" * 32
    ledger.declare(data.name, data.disjoint_from, "content", set().union(*identities(data)))
    for round_ in range(rounds):
        charge = replace(CHARGE, study=study, round=round_, noise_multiplier=sigma)
        number = ledger.reserve(data.name, charge, "adapter", lambda charges: None)
        log.begin_round(ledger.hash_of(number), ledger.order_of(number))
        log.append(Step(study, round_, sigma, 1.0, 1.0, "patient"), of_round=charge.steps)
        ledger.release(number, b"an update")
    AuditLog(ledger.folder, ledger.key).add("enroll")
    for patient in withdrawn:
        withdraw(site, patient, ledger)
    return ledger


def exact_epsilon(charges: Sequence[Charge], delta: float) -> float:
    """Compose Gaussian rounds of everybody (q = 1) exactly: as one Gaussian (Balle and Wang 2018).
    No function of fedtune's accountant is used."""
    assert all(charge.sampling_rate == 1.0 for charge in charges)
    mu = math.sqrt(sum(c.steps / c.noise_multiplier**2 for c in charges))
    if not mu:
        return 0.0

    def excess(epsilon: float) -> float:
        tail = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(
            -mu / 2 - epsilon / mu
        )
        return float(tail) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 200.0))


def kill_at(step: int, act: Callable[[], object]) -> bool:
    """Run `act` in a process that is killed before its `step`-th change to a file system; return
    whether it ended before that."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            changes = iter(range(step))

            def count(event: str, arguments: tuple[object, ...]) -> None:
                writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
                flags = arguments[2] if event == "open" else 0
                if event == "open" and isinstance(flags, int) and flags & os.O_CREAT:
                    writes = True
                if (writes or event == "sqlite3.connect") and next(changes, None) is None:
                    os._exit(9)  # as by SIGKILL: no handler, no clean-up

            sys.addaudithook(count)
            act()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), f"it failed by itself at step {step}"
    return status == 0


def hashes_of(ledger: Ledger, patients: Sequence[str]) -> set[str]:
    return {ledger.hashed(unit_member(patient)) for patient in patients}
