"""Find the coordinator's home beside a folder of runs, and the audit log in it."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.wire.keys import SigningKey

HOME = Path("coordinator")  # the home's default place, beside the folder of runs


def home_beside(run: Path) -> Path:
    """Return the path where the coordinator's home is expected: beside the folder that holds
    `run`."""
    return run.absolute().parent.parent / HOME


def coordinator_log(run: Path) -> AuditLog | None:
    """Return the audit log of the coordinator that made `run`; it is in the home beside the folder
    of runs. Return None if there is no such home, since `run` is a simulation, or a copy on another
    machine."""
    home = home_beside(run)
    key = home / "signing.key"
    return AuditLog(home, SigningKey.at(key)) if key.exists() else None
