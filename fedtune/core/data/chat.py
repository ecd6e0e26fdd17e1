"""Render a conversation by a base's chat template without access to a clock or random numbers.

A template that names today's date (Llama 3.1 and later, SmolLM3) would make a record's tokens
depend on the time at which the record is read, and so on the records read before it. One record
must not change the tokens of another."""

from __future__ import annotations

from typing import Any

import jinja2.debug  # noqa: F401 - or jinja2 imports it when a template fails on one record
from jinja2 import TemplateError, nodes
from transformers import PreTrainedTokenizerBase

from fedtune.core.errors import ConfigError

# What a template's call of the clock gives, whatever it asks for: the date that Llama 3.1's own
# template falls back on, a Friday.
_CODES = {
    "%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%b": "Jul", "%B": "July", "%d": "26",
    "%-d": "26", "%j": "208", "%a": "Fri", "%A": "Friday", "%H": "00", "%I": "12", "%M": "00",
    "%S": "00", "%p": "AM", "%Z": "", "%z": "",
}  # fmt: skip
_REPLACED = "".join(f"|replace({code!r}, {text!r})" for code, text in _CODES.items())
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}"
_OTHERWISE = (
    "choose a base with another template, or name columns.prompt and columns.completion in place "
    "of columns.messages"
)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options: Any) -> Any:
    """Apply the tokenizer's chat template to the messages `turns`, and return what the tokenizer's
    own `apply_chat_template` returns with these `options`: a text, or token ids.

    Guarantee: the result follows from the template, the turns and the options alone.
    Errors: those of the template."""
    template = str(tokenizer.get_chat_template())
    if "strftime_now" in template:
        template = _CLOCK + template
    return tokenizer.apply_chat_template(turns, chat_template=template, **options)


def check_draws_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a base's chat template draws no random numbers, and that it cannot write an
    object's address in memory into a text. Both would make the tokens of one record depend on the
    records before it, since the random generator and the memory belong to the whole process.
    Errors: ConfigError if the template may do so, or cannot be parsed."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = str(tokenizer.get_chat_template())
    try:
        parsed = _compile_jinja_template("").environment.parse(template)
    except (TemplateError, RecursionError) as error:
        raise ConfigError(
            f"the base's chat template cannot be read ({type(error).__name__})",
            "a Jinja template",
            _OTHERWISE,
        ) from None
    draws = any(map(_may_draw, parsed.find_all(nodes.Filter)))
    if draws or _list_used_names(parsed) & {"lipsum"}:
        raise ConfigError(
            "the base's chat template may use random numbers",
            "a template without `random` and `lipsum`, in which every `map` names a filter",
            _OTHERWISE,
        )
    if _list_used_names(parsed) & {"cycler", "joiner"}:
        raise ConfigError(
            "the base's chat template uses objects whose text is an address in memory",
            "a template without `cycler` and `joiner`",
            _OTHERWISE,
        )


def _may_draw(used: nodes.Filter) -> bool:
    """Return whether a filter in a chat template may draw a random number: the filter `random` may,
    and so may `map` if the filter that it applies is `random`, is another `map`, or is only known
    when the template runs."""
    if used.name != "map":
        return bool(used.name == "random")
    if used.dyn_args is not None:
        return True
    named = used.args[0] if used.args else None  # without a filter `map` takes an attribute
    mapped = named.value if isinstance(named, nodes.Const) else named
    return mapped is not None and (not isinstance(mapped, str) or mapped in ("random", "map"))


def _list_used_names(parsed: nodes.Template) -> set[str]:
    return {name.name for name in parsed.find_all(nodes.Name)}
