"""What a study leaves behind, and what must hold of it whatever was killed meanwhile."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.evidence.sign import EVIDENCE
from fedtune.officer.noted_in_run import noted_in
from tests.network.kit import SITES, Consortium, done

LINGER = 60.0  # seconds in which a process whose parent was killed ends by itself


def check(made: Consortium, private: bool) -> None:
    """Check the consortium's run and every site's records of it, once all has ended. private:
    whether the sites added noise; else they keep no update, and note no step.

    Errors: AssertionError; NotGenuine and LedgerError of what does not verify."""
    check_processes(made.root)
    check_drafts(made.root)
    check_logs(made)
    updates = check_run(made)
    for name in SITES:
        Ledger(made.root / name / "state").verify()
        if private:
            check_site(made, name, [entry for entry in updates if entry["site"] == name])


def check_run(made: Consortium) -> list[dict[str, Any]]:
    """Check that `fedtune verify` accepts the run as this consortium's; return what sites signed of
    their updates."""
    done(made.hub, "verify", "run", "--trust", made.fingerprint)
    evidence = json.loads((made.run / EVIDENCE).read_text())
    return [entry for entry in evidence["updates"] if entry["kind"] == "update"]


def check_site(made: Consortium, name: str, updates: list[dict[str, Any]]) -> None:
    """Check that what a site sent is in the run, each round once, and that it signed every noised
    step that it ran."""
    signed = Counter(int(entry["round"]) for entry in updates)
    assert set(signed.values()) == {1}, f"an update of {name} is not in the run once: {signed}"
    sent = {each.charge.round for each in made.spending(name) if each.released}
    assert sent == set(signed), f"what {name} sent is not what the run has: {sent}, {signed}"
    newest = max(updates, key=lambda entry: int(entry["round"]))
    told = sum(event["steps"] for event in json.loads(newest["said"]["events"]))
    ran = made.noised(name).total()
    assert told == ran, f"{name} signed {told} steps, and ran {ran}"


def check_logs(made: Consortium) -> None:
    """Check every audit log, and that a site's holds the head that the run has of it."""
    home = made.hub / "coordinator"
    audit_log.verify(home, audit_log.signer_at(home))
    for name in SITES:
        state = made.root / name / "state"
        audit_log.verify(state, audit_log.signer_at(state), noted_in(made.run, state))


def check_drafts(root: Path) -> None:
    """Check that who was started again removed what the process before left half written."""
    left = sorted(str(path.relative_to(root)) for path in root.rglob("*.new"))
    assert not left, f"drafts were left: {left}"


def check_processes(root: Path, seconds: float = LINGER) -> None:
    """Check that within `seconds` no process works in a folder under `root`."""
    deadline = time.monotonic() + seconds
    while left := list(working_in(root)):
        assert time.monotonic() < deadline, f"processes were left: {left}"
        time.sleep(0.2)


def working_in(root: Path) -> Iterator[str]:
    """Yield number and command of each process whose current folder is under `root`."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and (process / "cwd").readlink().is_relative_to(root):
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                yield f"{process.name} {' '.join(words)[:120]}"
