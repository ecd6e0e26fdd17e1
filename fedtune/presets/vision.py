"""Task "vision": train LoRA in the language part of a base that reads images, to answer
questions about them."""

from __future__ import annotations

from fedtune.presets._adapter import PARTS, Recipe
from fedtune.presets.answer import LORA

__all__ = ["COLUMNS", "CUT", "MAX_LENGTH", "PARTS", "study"]
COLUMNS = {
    "media": ("image", "image"),
    "prompt": ("prompt", "question"),
    "target": ("completion", "answer"),
}
MAX_LENGTH = 128  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "longer records are left out"

study = Recipe(
    task="vision",
    title="Answers to questions about images",
    records="questions about images, with answers",
    model="pypi:smol-vision",
    lora=LORA,
    objective="""\
name = "causal_lm"
max_length = 128                     # tokens of an image, a question and its answer that are read
template = "{text}\\nAnswer:\\n"
append_eos = false""",
    start=30.0,
    steps=20,
).study
