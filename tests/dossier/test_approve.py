"""Named people, and sites with their own keys, approve a dossier; what they signed stays theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, InputError, NotGenuine, Refused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence.dossier import seal
from fedtune.evidence.dossier.release import approve
from fedtune.evidence.verify import verify
from tests.cli_kit import run as command

WHO = {"name": "Dr Ada Lund", "role": "data protection officer", "reason": "read on 3 May"}


def test_a_person_approves_with_an_own_key(released: Any, tmp_path: Path) -> None:
    folder, found = shutil.copytree(released[0], tmp_path / "dossier"), released[1]
    key = tmp_path / "approver.key"
    given = [word for name, said in WHO.items() for word in (f"--{name}", said)]
    done = command("approve", folder, "--trust", found.signer, *given, "--key", key)
    assert done.exit_code == 0, done.output
    assert key.stat().st_mode & 0o077 == 0
    (one,) = verify(folder, trust=found.signer).dossier["approvals"]
    assert {k: one[k] for k in WHO} == WHO and one["site"] == "" and one["date"]
    verified = ("verify", folder, "--simulation", "--trust", found.signer)
    shown = command(*verified)
    assert shown.exit_code == 0 and '"Dr Ada Lund", "data protection officer"' in shown.output
    wanted = ("--approved", one["fingerprint"])
    assert command(*verified, *wanted).exit_code == 0
    other = command(*verified, "--approved", "0000 0000")
    assert other.exit_code == 3 and "nobody with the key" in other.stderr
    twice = command("approve", folder, "--trust", found.signer, *given, "--key", key)
    assert twice.exit_code == 2 and "already" in twice.stderr


def test_a_site_countersigns_with_the_key_of_its_updates(
    released: Any, signed: Any, tmp_path: Path
) -> None:
    folder, found = shutil.copytree(released[0], tmp_path / "dossier"), released[1]
    site = signed[0].parent / "north" / "site.toml"
    given = [word for name, said in WHO.items() for word in (f"--{name}", said)]
    done = command("approve", folder, "--trust", found.signer, *given, "--site", site)
    assert done.exit_code == 0, done.output
    (one,) = verify(folder).dossier["approvals"]
    assert one["site"] == "north"
    state = load_site(site).site.state
    log = audit_log.verify(state, Ledger(state).key.public)
    assert log.entries[-1]["event"] == "approve"
    assert log.entries[-1]["facts"] == {"release": seal.read_release(folder)[1]}
    shown = command("verify", folder, "--simulation", "--trust", found.signer).output
    assert ", the key of site north, " in shown
    both = command("approve", folder, "--trust", found.signer, *given, "--site", site, "--key", "k")
    assert both.exit_code == 2 and "one of the two" in both.stderr


def test_nobody_approves_a_strangers_folder_or_without_a_word(
    released: Any, signed: Any, tmp_path: Path
) -> None:
    folder, found = shutil.copytree(released[0], tmp_path / "dossier"), released[1]
    with pytest.raises(Refused, match="was signed by"):
        approve(folder, SigningKey(), "0000 0000 0000 0000 0000", **WHO)
    with pytest.raises(ConfigError, match="--reason"):
        approve(folder, SigningKey(), found.signer, **WHO | {"reason": " "})
    with pytest.raises(ConfigError, match="--name"):
        approve(folder, SigningKey(), found.signer, **WHO | {"name": "a\nb"})
    with pytest.raises(InputError, match="is not a dossier"):
        approve(signed[0], SigningKey(), signed[1].signer, **WHO)
    assert verify(folder).dossier["approvals"] == []


def test_an_approval_of_another_release_or_under_another_name_is_refused(
    released: Any, tmp_path: Path
) -> None:
    folder, key = shutil.copytree(released[0], tmp_path / "dossier"), SigningKey()
    digest = seal.read_release(folder)[1]
    path = folder / seal.APPROVALS / seal.file_name(key.public)
    path.parent.mkdir()

    def put(body: dict[str, Any]) -> None:
        path.write_bytes(canonical(body))

    put(seal.approval("0" * 64, key, **WHO))
    with pytest.raises(NotGenuine, match="approves another release"):
        verify(folder)
    genuine = seal.approval(digest, key, **WHO)
    put(genuine | {"role": "ethics board"})
    with pytest.raises(NotGenuine, match="signature does not fit"):
        verify(folder)
    put(genuine)
    assert len(verify(folder).dossier["approvals"]) == 1
    (path.parent / "other.json").write_bytes(path.read_bytes())
    with pytest.raises(NotGenuine, match="not named after its key"):
        verify(folder)
    (path.parent / "other.json").unlink()
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=1))
    with pytest.raises(NotGenuine, match="canonical JSON"):
        verify(folder)
