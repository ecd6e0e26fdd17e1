"""Answers to questions about images: LoRA in the language part of a base that reads images."""

from __future__ import annotations

from fedtune.presets._adapter import EPSILON, PARTS, Recipe

__all__ = ["COLUMNS", "EPSILON", "PARTS", "study"]
COLUMNS = {
    "media": ("image", "image"),
    "prompt": ("prompt", "question"),
    "target": ("completion", "answer"),
}

study = Recipe(
    task="vision",
    title="Answers to questions about images",
    records="questions about images, with answers",
    model="pypi:smol-vision",
    lora="""\
rank = 16
alpha = 32.0
modules = ["down_proj"]
last_layers = 1""",
    objective="""\
name = "causal_lm"
max_length = 128                     # tokens of an image, a question and its answer that are read
template = "{text}\\nAnswer:\\n"
append_eos = false""",
    start=5.0,
).study
