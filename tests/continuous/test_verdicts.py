"""Every verdict of a run is computed again from what its looks saw; a changed one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import NotGenuine
from fedtune.evidence.sign import list_covered
from fedtune.evidence.versions import check_versions
from fedtune.report import paired
from fedtune.server.version_report import in_use
from tests.continuous.test_looks import Drawn, Life

PLAN: dict[str, Any] = {"looks": 3, "groups": {"ward": 0.3}}


@pytest.fixture(autouse=True)
def fewer_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SWAPS", 2_000)


def lived(folder: Path) -> Life:
    """Versions with every verdict, a choice and its end: the third is much better; the fourth has
    no look left; the fifth, much better too, is on a new file while the first one is pinned."""
    gains = {3: 0.25, 5: 0.45, 6: 0.45}
    life = Life(folder, Drawn(0, lambda n: gains.get(n, 0.0), groups=True), **PLAN)
    life.go_on(4)
    life.versions.roll_back(0)
    life.public, life.records = "second", frozenset({"b"})
    life.go_on(1)
    life.versions.unpin()
    life.go_on(1)
    return life


def check(life: Life, said: dict[str, Any] | None = None) -> dict[str, int]:
    out, index = life.versions.out, life.versions.index()
    assert index is not None
    report = {"continuous": in_use(index) if said is None else said}
    return check_versions(out, life.progress.study, report, list_covered(out))


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired, "SWAPS", 2_000)
        return lived(tmp_path_factory.mktemp("lived") / "run")


def test_what_was_decided_is_what_follows(life: Life) -> None:
    index = life.versions.index()
    assert index is not None
    decisions = [version.decision for version in index.versions]
    assert decisions == [
        "first", "kept back", "kept back", "released", "not compared", "pinned", "released",
    ]  # fmt: skip
    assert [c.version for c in index.choices] == [0, None]
    assert index.versions[5].verdict == "better"  # and not released: a person had chosen
    assert check(life) == {"not better": 2, "better": 3, "outside the plan": 1}


def edit_verdict(record: dict[str, Any]) -> None:
    record["versions"][2] |= {"verdict": "better", "why": "", "decision": "released"}
    record["versions"][3]["champion"] = 2


def edit_decision(record: dict[str, Any]) -> None:
    record["versions"][1]["decision"] = "released"


def edit_p(record: dict[str, Any]) -> None:
    record["versions"][1]["p"] = 0.0001


def edit_group(record: dict[str, Any]) -> None:
    record["versions"][3]["groups"][0]["change"] += 0.1


def edit_outside(record: dict[str, Any]) -> None:
    record["versions"][4] |= {"verdict": "not better", "decision": "kept back", "look": 4}


def hide_a_look(record: dict[str, Any]) -> None:
    record["versions"][1] |= {"verdict": "outside the plan", "why": "", "decision": "not compared"}


def hide_the_choice(record: dict[str, Any]) -> None:
    record["choices"] = []


def other_choice(record: dict[str, Any]) -> None:
    """The last one, of a version that was never released: no later comparison was with it."""
    record["choices"].append({"after": 6, "version": 1})
    record |= {"champion": 1, "pinned": True}


def other_champion(record: dict[str, Any]) -> None:
    record["champion"] = 3


def drop_a_version(record: dict[str, Any]) -> None:
    del record["versions"][2]


def renamed_rule(record: dict[str, Any]) -> None:
    """As if it had been decided by the rule before there were looks."""
    record["versions"][2] |= {"p": None, "look": None, "sure": 0.97, "decision": "released"}


EDITS = [
    edit_verdict, edit_decision, edit_p, edit_group, edit_outside, hide_a_look, hide_the_choice,
    other_choice, other_champion, drop_a_version, renamed_rule,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
def test_a_verdict_that_was_changed_is_caught_whoever_signs_it(
    life: Life, edit: Callable[[dict[str, Any]], None]
) -> None:
    """In the report and in the running study's list alike."""
    index = life.versions.folder / "index.json"
    whole = index.read_text()
    said = json.loads(json.dumps(check_said(life)))
    edit(said["record"])
    released = [v["number"] for v in said["record"]["versions"] if v["decision"] == "released"]
    said |= {"versions released": released, "version in use": said["record"]["champion"]}
    said |= {"chosen by a person": said["record"]["pinned"]}
    try:
        index.write_text(json.dumps({"format": "fedtune-versions-1", **said["record"]}))
        with pytest.raises(NotGenuine):
            check_versions(
                life.versions.out, life.progress.study, {"continuous": said},
                list_covered(life.versions.out),
            )  # fmt: skip
    finally:
        index.write_text(whole)


def check_said(life: Life) -> dict[str, Any]:
    index = life.versions.index()
    assert index is not None
    return in_use(index)


def test_the_running_studys_list_may_not_say_otherwise(life: Life) -> None:
    """It is not signed, since a person may choose: what is in it is in the signed report."""
    said, index = check_said(life), life.versions.folder / "index.json"
    whole = index.read_text()
    try:
        document = json.loads(whole)
        edit_verdict(document)
        index.write_text(json.dumps(document))
        with pytest.raises(NotGenuine, match="says otherwise than the signed report"):
            check(life, said)
    finally:
        index.write_text(whole)
    assert check(life, said)


@pytest.mark.parametrize("name", ["look-1.json", "looked.json"])
def test_what_a_verdict_rests_on_must_be_there(life: Life, name: str) -> None:
    file = life.versions.folder / name
    whole = file.read_bytes()
    try:
        file.unlink()
        with pytest.raises((NotGenuine, KeyError)):
            check(life)
    finally:
        file.write_bytes(whole)


def test_scores_that_were_changed_give_another_verdict(life: Life) -> None:
    """By whoever can sign the run anew: verdict and scores must agree."""
    file = life.versions.folder / "look-3.json"
    whole = file.read_bytes()
    content = json.loads(whole)
    content["after"] = content["before"]
    try:
        file.write_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        with pytest.raises(NotGenuine, match="version 3: its verdict is 'better'"):
            check(life)
    finally:
        file.write_bytes(whole)
