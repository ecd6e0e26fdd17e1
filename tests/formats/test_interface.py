"""What users rely on stays, or CHANGELOG.md says what became of it: keys, flags, names, numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest

import fedtune
from tests.docs import reference
from tests.formats import interface
from tests.formats.interface import Interface, changes, name, unnamed

RELEASE, NOW = interface.kept()
LORA, PLAN, CALL = "study.toml [lora]", "fedtune plan", "fedtune.plan()"
SECTION = (
    "# Changelog\n\n## {}\n\n### {}\n- `{}` is called otherwise.\n\n## 0.1.0\n\n### Added\n- All.\n"
)


@pytest.fixture(scope="module")
def found() -> Interface:
    return interface.interface()


def test_what_users_rely_on_is_there_or_the_changelog_says_what_became_of_it(
    found: Interface,
) -> None:
    changelog = interface.CHANGELOG.read_text(encoding="utf-8")
    left = unnamed(changes(NOW, found), RELEASE, changelog)
    todo = (
        "name it in CHANGELOG.md under Changed or Removed, as here; of what is not released yet: "
    )
    assert left == [], todo + "python -m tests.formats.interface"


def test_what_is_kept_is_what_the_code_has_but_for_additions(found: Interface) -> None:
    """Or the file would prove nothing. Its form is the one that is written."""
    assert sum(map(len, NOW.values())) > 1000
    assert NOW[LORA]["rank"] == {"default": "8", "takes": ["integer"]}
    assert NOW[PLAN]["--size"]["takes"] == ["integer", "many"]
    assert NOW[CALL]["study"] == {"default": "required", "takes": ["keyword", "place 0"]}
    assert interface.dumped(RELEASE, NOW) == interface.KEPT.read_text(encoding="utf-8")
    assert json.loads(interface.dumped("9.9.9", found))["entries"] == found


def test_what_is_experimental_is_there(found: Interface) -> None:
    names = {name(group) for group in found}
    names |= {name(group, member) for group, members in found.items() for member in members}
    for pattern in interface.experimental():
        assert any(fnmatchcase(each, pattern) for each in names), pattern
    assert not found[LORA]["rank"].get("experimental")
    assert found[LORA]["min_rank"]["experimental"]


def without(group: str, member: str = "") -> Callable[[Interface], object]:
    return lambda now: now[group].pop(member) if member else now.pop(group)


def given(group: str, member: str, **entry: object) -> Callable[[Interface], object]:
    return lambda now: now[group].setdefault(member, {}).update(entry)


# What a careless change does, and what it must be called.
BROKEN: dict[str, Callable[[Interface], object]] = {
    "lora.rank": without(LORA, "rank"),
    "lora.alpha": given(LORA, "alpha", default="32.0"),
    "lora.train": given(LORA, "train", takes=['"B"']),
    "[selection]": without("study.toml [selection]"),
    "study.author": given("study.toml [study]", "author", default="required"),
    "study.seed": given("study.toml [study]", "seed", experimental=True),
    "fedtune plan": without(PLAN),
    "fedtune plan --size": without(PLAN, "--size"),
    "fedtune plan argument 2": given(PLAN, "argument 2", takes=["path"]),
    "fedtune.plan": without(CALL),
    "fedtune.plan(sites)": given(CALL, "sites", takes=["keyword"]),
    "fedtune.Plan.sites": without("fedtune.Plan", "sites"),
    "ConfigError": given("exit codes", "ConfigError", default="3"),
    "PROTOCOL": given("numbers", "PROTOCOL", default="6"),
    "ledger": given("numbers", "ledger", default="1"),
}


@pytest.mark.parametrize("named", BROKEN)
def test_the_twin_that_breaks_a_stable_name_is_caught_unless_it_is_said(named: str) -> None:
    now = copy.deepcopy(NOW)
    BROKEN[named](now)
    (change,) = broken = changes(NOW, now)
    assert (change.name, change.stable) == (named, True)

    def said(version: str, heading: str, word: str = named) -> bool:
        return unnamed(broken, "0.1.0", SECTION.format(version, heading, word)) == []

    assert said("0.2.0 (unreleased)", "Changed") and said("0.2.0", "Removed")
    assert not said("0.2.0", "Added") and not said("0.1.1", "Changed")
    assert not said("0.2.0", "Changed", "another")
    assert unnamed(broken, "0.2.0", SECTION.format("0.2.0", "Changed", named)) == broken


def test_what_is_experimental_changes_with_the_third_number_but_not_unsaid() -> None:
    now = copy.deepcopy(NOW)
    without("fedtune improve")(now)
    broken = changes(NOW, now)
    assert [(change.name, change.stable) for change in broken] == [("fedtune improve", False)]
    assert unnamed(broken, "0.1.0", SECTION.format("0.1.1", "Removed", "fedtune improve")) == []
    assert unnamed(broken, "0.1.0", SECTION.format("0.1.1", "Added", "fedtune improve")) == broken


def test_what_is_added_beside_passes() -> None:
    now = copy.deepcopy(NOW)
    given(LORA, "new", default="–")(now)
    given(LORA, "train", takes=['"AB"', '"B"', '"A"'])(now)
    given(PLAN, "--new", default="–")(now)
    given(CALL, "new", default="–", takes=["keyword"])(now)
    now["fedtune anew"] = {"argument 1": {"default": "required"}}
    now["study.toml [anew]"] = {"key": {"default": "required"}}
    assert changes(NOW, now) == []


def test_the_twin_on_the_code_itself(found: Interface, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, a flag and a name that are taken out of the code are missed."""
    keys, parameters = reference.keys(), reference.parameters
    monkeypatch.setattr(
        reference, "keys", lambda: {k: v for k, v in keys.items() if k != ("[lora]", "rank")}
    )
    monkeypatch.setattr(
        reference, "parameters", lambda c: [p for p in parameters(c) if "--quick" not in p.opts]
    )
    monkeypatch.setattr(fedtune, "__all__", [n for n in fedtune.__all__ if n != "tune"])
    gone = {change.name for change in changes(found, interface.interface())}
    assert gone == {"lora.rank", "fedtune plan --quick", "fedtune demo --quick", "fedtune.tune"}
