"""What a site tells of its decision: by an explicit act alone, and the decision alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import InputError
from fedtune.core.ledger.audit_log import verify
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence.told import KEYS, PURPOSE, lines, read_told, state
from fedtune.officer.acceptance.accept import accept, tell
from tests.cli_kit import run as command
from tests.client.test_acceptance import judged, world

__all__ = ["world"]


def signed_by(*sites: str) -> None:
    """Let the run hold that these sites took part, with the key of the site here."""
    key = Ledger(Path("state")).key.public
    content = {"sites": {name: {"signing": key} for name in sites}}
    Path("run/evidence.json").write_text(json.dumps(content))


def handed_over() -> Path:
    made = judged()
    signed_by("north")
    Path("run/told").mkdir()
    tell("run", load_site("site.toml"), "run/told/north.json")
    assert json.loads(Path("run/told/north.json").read_text())["decision"] == made.decision
    return Path("run/told/north.json")


def test_nothing_is_told_unless_a_person_tells_it(world: Path) -> None:
    done = command("accept", "run", "--site", "site.toml")
    assert done.exit_code == 0 and not read_told(Path("run"))
    assert not [path for path in Path("run").rglob("*") if "told" in path.name]
    again = command("accept", "run", "--site", "site.toml", "--tell", "north.json")
    assert again.exit_code == 0 and "no ε covers it" in again.output
    assert len(list(Path("state/acceptance").iterdir())) == 1, "telling judges nothing"
    first, second = verify(Path("state"), Ledger(Path("state")).key.public).entries
    assert (first["rule"], second["rule"]) == ("", "told") and second["event"] == "assess"


def test_a_statement_has_the_decision_and_no_figure(world: Path) -> None:
    content = json.loads(handed_over().read_text())
    assert {*content} == KEYS and all(isinstance(value, str) for value in content.values())
    assert Path("run/told/north.json").stat().st_mode & 0o777 == 0o600


def test_the_coordinator_sees_what_was_told_by_name(world: Path) -> None:
    path = handed_over()
    (one,) = read_told(Path("run"))
    decision = json.loads(path.read_text())["decision"]
    assert (one.site, one.decision, one.problem) == ("north", decision, "")
    said = lines([one])
    assert said[0].startswith(f"north: {decision}, told by a person there")
    assert "nobody told anything" in said[1]


def forge(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_bytes(canonical(content))


def test_a_statement_that_was_changed_or_is_of_another_says_nothing(world: Path) -> None:
    path = handed_over()
    whole = path.read_bytes()
    other = {"accepted": "refused"}.get(json.loads(whole)["decision"], "accepted")
    forge(path, decision=other)
    assert read_told(Path("run"))[0].problem == "not signed by a site that took part"
    forged = json.loads(whole) | {"decision": other, "key": (key := SigningKey()).public}
    body = {name: value for name, value in forged.items() if name != "signature"}
    path.write_bytes(canonical(body | {"signature": key.sign(PURPOSE + canonical(body))}))
    assert read_told(Path("run"))[0].problem == "not signed by a site that took part"
    path.write_bytes(whole)
    signed_by("south")
    assert read_told(Path("run"))[0].problem == "not signed by a site that took part"
    signed_by("north")
    assert read_told(Path("run"))[0].problem == ""
    for bad in (b"{", b"[]", b'{"format":"fedtune-told-1"}', b"\xff", b""):
        path.write_bytes(bad)
        assert read_told(Path("run"))[0].problem == "no statement of a site"


def test_a_statement_of_another_model_is_not_taken_for_this_ones(world: Path) -> None:
    path = handed_over()
    shutil.copytree("run", "other")
    shutil.copy(path, "other/told/north.json")
    weights = next(Path("other/adapter").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    (one,) = read_told(Path("other"))
    assert one.problem == "of another model than this run's" and not one.decision
    with pytest.raises(InputError, match="made no decision about this model"):
        tell("other", load_site("site.toml"), "new.json")


def test_the_newest_decision_is_told_and_no_file_is_replaced(world: Path) -> None:
    handed_over()
    with pytest.raises(InputError, match="exists"):
        tell("run", load_site("site.toml"), "run/told/north.json")
    text = Path("site.toml").read_text().replace("accuracy = 0.1", "accuracy = 1.0")
    Path("site.toml").write_text(text)
    newest = accept("run", load_site("site.toml"))
    record = newest.folder / "record.json"
    assert record.exists() and newest.decision == "refused"
    ledger = Ledger(Path("state"))
    later = json.loads(record.read_text())
    assert json.loads(state(later, ledger.key))["decision"] == "refused"
    assert tell("run", load_site("site.toml"), "newest.json") == "refused"
