"""Whatever a membership of a hospital signs for others has its own key, and never the ledger's, by
which two coordinators would see that they know one hospital."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.core.ledger.ledger import Ledger, signing_key
from fedtune.evidence import incident
from fedtune.evidence.dossier import seal
from fedtune.evidence.verify import verify
from tests.cli_kit import run as command
from tests.cli_kit import write_study
from tests.simulated import simulate

HOSPITAL = """
[hospital]
name = "hospital"
declared_size = 12
[datasets.records]
path = "../north/data.jsonl"
[memberships.cardio]
site = "../north/site.toml"
"""
OF_HOME = """
[hospital]
home = "../home"
membership = "cardio"
[acceptance]
path = "held.jsonl"
columns = { prompt = "prompt", completion = "completion" }
thresholds = { loss = 100.0 }
least_group = 10
"""
WHO = ("--name", "Dr Ada Lund", "--role", "officer", "--reason", "read")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The site file of a membership that took part in a run, whose dossier lies beside it."""
    folder = tmp_path_factory.mktemp("membership")
    study, file = write_study(folder, tiny_base), folder / "north" / "site.toml"
    (folder / "home").mkdir()
    (folder / "home" / "hospital.toml").write_text(HOSPITAL)
    file.write_text(file.read_text() + OF_HOME)
    rows = [{"prompt": f"Another {n}: is it so?", "completion": " yes"} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "north" / "held.jsonl").write_text(text)
    simulate(study, [file, folder / "south" / "site.toml"], folder / "run")
    done = command("release", folder / "run", "--out", folder / "dossier")
    assert done.exit_code == 0, done.output
    return file


def signed_outwards(site: Path, out: Path) -> list[Path]:
    """Make every signature of the membership that others see; return the files that hold them."""
    run, dossier = site.parent.parent / "run", out / "dossier"
    shutil.copytree(site.parent.parent / "dossier", dossier)
    trust = verify(dossier).signer
    for words in (
        ("enroll", site, "--out", out / "request"),
        ("approve", dossier, "--trust", trust, *WHO, "--site", site),
        ("accept", run, "--site", site),
        ("accept", run, "--site", site, "--tell", out / "told.json"),
        ("evidence", site, "--to", out / "incident"),
    ):
        done = command(*words)
        assert done.exit_code == 0, done.output
    updates = [path for path in run.rglob("*") if path.is_file()]  # a coordinator has all of it
    approvals = [path for path in dossier.rglob("*") if path.is_file()]
    others = [out / "request", out / "told.json", out / "incident" / incident.MANIFEST]
    return [*updates, *approvals, *others]


def holding(key: str, files: list[Path]) -> set[str]:
    """Return the names of the files that hold a public key, as text or as bytes."""
    forms = (key.encode(), key.upper().encode(), bytes.fromhex(key))
    return {path.name for path in files if any(form in path.read_bytes() for form in forms)}


def test_nothing_that_others_see_has_the_ledgers_key(site: Path, tmp_path: Path) -> None:
    loaded = load_site(site)
    ledger = Ledger(loaded.home)
    files = signed_outwards(site, tmp_path)
    assert holding(ledger.key.public, files) == set()
    own = signing_key(loaded, ledger).public
    named = holding(own, files)
    assert {"evidence.json", "request", "told.json", incident.MANIFEST} <= named
    (approval,) = (json.loads(p.read_text()) for p in files if p.parent.name == seal.APPROVALS)
    assert approval["key"] == own, "the site's approval is known by the key of its updates"


def test_a_signature_by_the_ledger_is_found(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    monkeypatch.setattr("fedtune.core.ledger.ledger.signing_key", lambda site, book: book.key)
    ledger = Ledger(load_site(site).home)
    of_incidents = type("OfIncidents", (), {"at": staticmethod(lambda _: ledger.key)})
    monkeypatch.setattr(incident, "SigningKey", of_incidents)
    found = holding(ledger.key.public, signed_outwards(site, tmp_path))
    assert {"request", incident.MANIFEST} <= found and len(found) > 2
