"""Task "speech": train LoRA in Whisper's decoder to transcribe recordings."""

from __future__ import annotations

from fedtune.presets._adapter import PARTS, Recipe

__all__ = ["COLUMNS", "CUT", "MAX_LENGTH", "PARTS", "study"]
COLUMNS = {"media": ("audio", "audio"), "target": ("text", "text")}
MAX_LENGTH = 64  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "longer records are left out"

study = Recipe(
    task="speech",
    title="What is said in a recording",
    records="recordings, with what is said",
    model="pypi:whisper-tiny-en",
    lora="""\
rank = 8
alpha = 16.0
modules = ["fc1", "fc2"]
last_layers = 1""",
    objective="""\
name = "causal_lm"
max_length = 64                      # tokens of what is said
append_eos = false""",
    start=15.0,
    lead=" ",  # as Whisper writes, and reads what a record says
).study
