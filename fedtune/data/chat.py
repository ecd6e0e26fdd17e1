"""Render a conversation by a base's chat template, which sees no clock and draws nothing.

A template that names today's date (Llama 3.1 and later, SmolLM3) would give a record other tokens
before midnight than after it, and when a record is read follows from how long earlier ones took."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedtune.errors import ConfigError

# What a template's call of the clock gives, whatever it asks for: the date that Llama 3.1's own
# template falls back on, a Friday.
_CODES = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%b": "Jul", "%B": "July", "%d": "26",
    "%-d": "26", "%j": "208", "%a": "Fri", "%A": "Friday", "%H": "00", "%I": "12", "%M": "00",
    "%S": "00", "%p": "AM", "%Z": "", "%z": "",
}  # fmt: skip
_REPLACED = "".join(f"|replace({code!r}, {text!r})" for code, text in _CODES.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}"
_DRAWS = re.compile(r"\|\s*random\b|\blipsum\b")


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> Any:
    """Apply the tokenizer's chat template to `turns`, as `apply_chat_template` does with `options`.

    Guarantee: the result follows from the template, the turns and the options alone.
    Errors: those of the template."""
    template = str(tokenizer.get_chat_template())
    if "strftime_now" in template:
        template = _CLOCK + template
    return tokenizer.apply_chat_template(turns, chat_template=template, **options)


def check_draws_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that draws at random: the generator is the whole process' own, so that what
    one record takes from it another does not get. Errors: ConfigError."""
    if _DRAWS.search(str(tokenizer.chat_template)):
        raise ConfigError(
            "the base's chat template draws at random",
            "a template without `random` and `lipsum`",
            "choose a base with another template, or columns.prompt and columns.completion",
        )
