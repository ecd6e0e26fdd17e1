"""No record text reaches a log, whoever hands it over and in whatever field."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune import server
from fedtune.core.config import PolicyTable
from fedtune.core.errors import BudgetExceeded
from fedtune.core.registry import reasons as phrases
from fedtune.core.registry.reasons import OTHER, PHRASES, reason_of
from fedtune.observe import JsonLog, NotLoggable
from fedtune.observe import log as log_module
from fedtune.observe.log import FIELDS, STRICT, cleaned
from fedtune.server.exchange import ERROR_TEXT

NOTE = "Mrs Ackroyd, 71, seen with fever; HIV positive"  # what must never be in a log
DIGEST = "sha256:" + "5d" * 32
ROUND: dict[str, Any] = {
    "private": True,
    "round": 2,
    "rounds": 8,
    "participants": ["south", "north"],
    "missing": {"west": "failed: no answer in time"},
    "quality": {"loss": 2.5},
    "epsilon": {"north": 1.23456789, "south": 1.0},
    "bytes_up": {"north": 100, "south": 110},
    "bytes_down": {"north": 200},
    "bytes": 410,
    "seconds": 12.5,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_one_line_of_its_own_fields(tmp_path: Path) -> None:
    sink = JsonLog(tmp_path / "log.jsonl", role="coordinator")
    sink("start", {"study": "inventory", "plan_digest": DIGEST, "done": 0, "rounds": 8})
    sink("step", {"text": NOTE, "done": 3, "total": 9})
    sink("site", {"name": "west", "status": "failed", "reason": "no answer in time", "round": 2})
    sink("round", ROUND)
    report = {"metric": "loss", "before": {"loss": 3.0}, "by_round": [{"round": 1, "loss": 2.5}]}
    sink("done", {"out": "runs/a", "privacy": {"epsilon": 1.0}, "quality": report, "rounds": 8})
    start, site, round_, done = lines(sink.path)
    assert set(done) == {"time", "role", "event", "rounds"}
    assert start["plan_digest"] == DIGEST and start["role"] == "coordinator"
    assert (site["site"], site["reason"]) == ("west", "no answer in time")
    assert round_["participants"] == ["north", "south"]
    assert round_["missing"] == {"west": "no answer in time"}
    assert round_["epsilon"]["north"] == 1.234568  # never smaller than it is
    assert sink.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("field", [*FIELDS, "note", "record", "loss", "norms", NOTE])
@pytest.mark.parametrize("wrap", [str, lambda t: [t], lambda t: {t: 1}, lambda t: {"north": t}])
def test_record_text_in_any_field_of_any_shape_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, wrap: Any
) -> None:
    monkeypatch.delenv(STRICT)
    sink = JsonLog(tmp_path / "log.jsonl")
    sink("site", {field: wrap(NOTE)})
    assert "Ackroyd" not in sink.path.read_text() and "HIV" not in sink.path.read_text()


def test_an_event_name_is_not_a_way_in_either(tmp_path: Path) -> None:
    assert cleaned(NOTE, {}, strict=False) == {"event": OTHER, "dropped": ["event"]}
    with pytest.raises(NotLoggable):
        cleaned(NOTE, {}, strict=True)


@given(text=st.text(min_size=1), field=st.sampled_from(["reason", "status", "kind", "error"]))
def test_a_word_of_another_machine_is_one_of_ours_or_other(text: str, field: str) -> None:
    value = cleaned("site", {field: text}, strict=True)[field]
    assert value == OTHER or value in text or value == ""
    if field == "reason":
        assert value in (*PHRASES, OTHER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("note", "a"),
        ("losses", [0.5]),
        ("round", "2"),
        ("round", -1),
        ("round", True),
        ("bytes", 1.5),
        ("seconds", "12"),
        ("private", 1),
        ("name", "Mrs Ackroyd"),
        ("name", "a" * 65),
        ("plan_digest", "sha256:5d"),
        ("epsilon", {"Mrs Ackroyd": 1.0}),
        ("participants", "north"),
        ("participants", ["north"] * 10_001),
        ("address", "north says: hello"),
    ],
)
def test_an_unlisted_field_or_another_type_raises_here_and_is_dropped_in_production(
    field: str, value: Any
) -> None:
    with pytest.raises(NotLoggable) as caught:
        cleaned("site", {field: value, "rounds": 8}, strict=True)
    assert "Ackroyd" not in str(caught.value)
    assert cleaned("site", {field: value, "rounds": 8}, strict=False) == {
        "event": "site",
        "rounds": 8,
        "dropped": [field],
    }


def test_the_reasons_that_the_policy_gives_are_told_apart() -> None:
    for rule in PolicyTable.model_fields:
        assert reason_of(f"lora.rank 99 is above policy.{rule} 64") == f"policy.{rule}"
    budget = BudgetExceeded("the study would go past policy.max_epsilon_per_study", "at most ε = 8")
    assert reason_of(f"refused: {budget}") == "policy.max_epsilon_per_study"
    assert reason_of(NOTE) == OTHER and reason_of("") == ""
    assert reason_of(f"no answer in time {NOTE}") == "no answer in time"


RULE = "max_rank"
TELLERS = {"Outcome", "_DroppedUpdate", "Reply", "SealError", "PolicyRefused", "BudgetExceeded"}


def own_reasons() -> Iterator[tuple[str, str]]:
    """(where, text) of every reason that the code itself gives, RULE for what it fills in."""
    root = Path(server.__file__).parents[1]
    folders = (root / "server", root / "core" / "vault", root / "officer")
    for file in (file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in TELLERS:
                for part in node.args:
                    pieces = part.values if isinstance(part, ast.JoinedStr) else [part]
                    texts = [
                        str(getattr(each, "value", "")) if isinstance(each, ast.Constant) else RULE
                        for each in pieces
                    ]
                    if len(re.findall("[a-z]{2,}", text := "".join(texts))) > 3:
                        yield f"{file.name}:{node.lineno}", text
                        break  # what happened; the rest says what was expected


def test_a_reason_that_the_code_gives_has_a_phrase_in_the_log() -> None:
    reasons = [*own_reasons(), *(("ERROR_TEXT", text) for text in ERROR_TEXT.values())]
    assert len(reasons) > 20
    unknown = [where for where in reasons if reason_of(where[1]) == OTHER]
    assert not unknown, f"give it a phrase in fedtune/core/registry/reasons.py: {unknown}"


def test_twin_a_reason_that_lost_its_phrase_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(phrase for phrase in PHRASES if phrase != "no answer in time")
    monkeypatch.setattr(phrases, "PHRASES", kept)
    with pytest.raises(AssertionError):
        test_a_reason_that_the_code_gives_has_a_phrase_in_the_log()


def test_twin_a_log_that_takes_a_reason_as_it_comes_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_module.FIELDS, "reason", str)
    with pytest.raises(AssertionError):
        test_record_text_in_any_field_of_any_shape_is_not_written(
            tmp_path, monkeypatch, "reason", str
        )


def test_twin_a_log_that_takes_unlisted_fields_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_module.FIELDS, "note", str)
    with pytest.raises(AssertionError):
        test_record_text_in_any_field_of_any_shape_is_not_written(
            tmp_path, monkeypatch, "note", str
        )
    with pytest.raises(pytest.fail.Exception):
        test_an_unlisted_field_or_another_type_raises_here_and_is_dropped_in_production("note", "a")


def test_numbers_that_are_not_finite_are_null_and_the_line_stays_json(tmp_path: Path) -> None:
    sink = JsonLog(tmp_path / "log.jsonl")
    sink("round", {**ROUND, "quality": {"loss": float("nan")}, "epsilon": {"n": float("inf")}})
    (line,) = lines(sink.path)
    assert line["quality"] == {"loss": None} and line["epsilon"] == {"n": None}


def test_a_large_log_moves_aside_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "LIMIT", 100)
    sink = JsonLog(tmp_path / "log.jsonl")
    for number in range(9):
        sink("round", {"round": number})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "log.jsonl.1"]
    assert lines(sink.path)[-1]["round"] == 8


def test_a_disk_that_refuses_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    sink = JsonLog(tmp_path / "folder")  # a folder is no log
    with caplog.at_level(logging.WARNING):
        sink("round", ROUND)
        sink("round", ROUND)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
