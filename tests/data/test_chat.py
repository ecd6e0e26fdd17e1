"""A base's chat template sees no clock and draws nothing, so that what a conversation becomes does
not follow from when it is read."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from fedtune.core.config import Columns, ObjectiveTable, SiteData
from fedtune.core.data import chat
from fedtune.core.data.load import check_columns
from fedtune.core.data.records import Record
from fedtune.core.data.tokenize import _tokenise
from fedtune.core.errors import ConfigError
from tests.server.fakes import make_study

TURNS = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "fine"}]
BODY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
# As in the templates of Llama 3.2 Instruct and of SmolLM3; in a macro, and with times.
DATED = [
    "{%- set today = strftime_now('%d %b %Y') %}{{ 'Today: ' + today + '\\n' }}" + BODY,
    "{{ strftime_now('%A, %d %B %Y, %H:%M') }} {% for m in messages %}{{ strftime_now('%Y-%m-%d')"
    " + m['content'] + eos_token }}{% endfor %}",
    "{% macro head() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ head() }}" + BODY,
]
FIXED = ["Today: 26 Jul 2024\n", "Friday, 26 July 2024, 00:00 2024-07-26", "26 July 2024user"]


@pytest.fixture()
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> Any:
    return make_tokenizer()


@pytest.fixture()
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a day on at each look."""
    days: Iterator[int] = iter(range(100))

    class Clock(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
            return dt.datetime(2026, 11, 28) + dt.timedelta(days=next(days))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.mark.parametrize(("template", "says"), list(zip(DATED, FIXED, strict=True)))
def test_a_template_that_names_the_date_gets_one_that_stands(
    tokenizer: Any, clock: None, template: str, says: str
) -> None:
    """Twin: by the library alone, two looks give two texts."""
    tokenizer.chat_template = template
    first, second = (chat.render(tokenizer, TURNS, tokenize=False) for _ in range(2))
    assert first == second and first.startswith(says)
    alone = [tokenizer.apply_chat_template(TURNS, tokenize=False) for _ in range(2)]
    assert alone[0] != alone[1]


def test_a_record_has_the_same_tokens_whenever_it_is_read(tokenizer: Any, clock: None) -> None:
    tokenizer.chat_template = DATED[0]
    objective = ObjectiveTable(name="causal_lm", max_length=128)
    record = Record("", messages=tuple((turn["role"], turn["content"]) for turn in TURNS))
    first, second = (_tokenise(record, objective, tokenizer, "text", True) for _ in range(2))
    assert repr(first) == repr(second) and "Today: 26 Jul" in tokenizer.decode(first.passages[0][0])


def test_a_template_without_a_clock_is_the_librarys_own(tokenizer: Any) -> None:
    for body in (BODY, "\n" + BODY):
        tokenizer.chat_template = body
        assert chat.render(tokenizer, TURNS, tokenize=False) == tokenizer.apply_chat_template(
            TURNS, tokenize=False
        )


@pytest.mark.parametrize(
    "draw",
    [
        *("{{ [1, 2] | random }}", "{{[1,2]|random}}", "{{ lipsum() }}"),
        *("{{ [range(9)]|map('random')|first }}", "{% filter random %}abc{% endfilter %}"),
        *("{{ [range(9)]|map('ran' ~ 'dom')|first }}", "{{ [[[1]]]|map('map', 'random')|list }}"),
        *("{{ [range(9)]|map(*['random'])|first }}", "{% set f = lipsum %}{{ f() }}"),
    ],
)
def test_a_template_that_draws_is_refused(tokenizer: Any, draw: str) -> None:
    tokenizer.chat_template = BODY + draw
    with pytest.raises(ConfigError, match="may use random numbers"):
        chat.check_draws_nothing(tokenizer)
    usual = "{{ messages|map(attribute='role')|map('upper')|join }}{{ 'random' if randomly }}"
    for body in (BODY, BODY + usual, "{% generation %}{{ 1 }}{% endgeneration %}"):
        tokenizer.chat_template = body
        chat.check_draws_nothing(tokenizer)


@pytest.mark.parametrize("shows", ["{{ cycler('a') }}", "{{ (joiner()|string)[-6:] }}"])
def test_a_template_that_writes_where_an_object_lies_is_refused(tokenizer: Any, shows: str) -> None:
    """Which follows from what earlier records left in memory. Twin: the library writes it."""
    tokenizer.chat_template = shows
    assert re.search("[0-9a-f]{5}>", chat.render(tokenizer, TURNS, tokenize=False))
    with pytest.raises(ConfigError, match="an address in memory"):
        chat.check_draws_nothing(tokenizer)


def test_a_template_that_is_none_is_refused_by_name(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match="TemplateSyntaxError"):
        chat.check_draws_nothing(tokenizer)


def test_a_study_of_a_template_that_draws_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Before a record is read; where no conversation is rendered, any template will do."""
    tokenizer.chat_template = BODY + "{{ lipsum() }}"
    study = make_study()
    turns = SiteData(path=tmp_path / "none.jsonl", columns=Columns(messages="turns"))
    with pytest.raises(ConfigError, match="may use random numbers"):
        check_columns(turns, study, tokenizer)
    check_columns(SiteData(path=turns.path, columns=Columns(text="t")), study, tokenizer)
