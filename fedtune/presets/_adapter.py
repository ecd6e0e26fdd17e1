"""Build a study that adapts a base by LoRA after a start from public records. Several tasks share
this module.

The adapter's frozen factor, the preconditioner and some steps before the first round are computed
from public records with answers, which costs no ε. The coordinator uses the selection records to
choose how far a round moves the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune import presets
from fedtune.core.dp.accountant import calibrate
from fedtune.core.errors import ConfigError
from fedtune.presets import _public
from fedtune.presets.templates import quote_string

if TYPE_CHECKING:
    from fedtune.presets import Records

RECORDS = 4  # the largest number of records of a patient
NOISE = 0.3  # standard deviation of the noise in a weight after the step
LONGEST = 150.0  # largest learning rate, for studies with hardly any noise
# If the noise of the mean (`noise_of_mean`) is at least this, only few directions are trained. This
# noise is 0.004 for 3 sites of 100 units at ε = 4.9. It is 0.002 for 9 sites of 87 units at ε = 8,
# where all directions can be trained.
LOUD = 0.0025
NARROW_NOISE, NARROW_LONGEST = 0.05, 15.0  # NOISE and LONGEST for studies that train few directions
# The shares into which the file --evaluation is divided. If --public names a second file, this file
# is the part "public", and the first file is divided into the other two parts.
PARTS = {"public": 0.5, "selection": 0.2, "evaluation": 0.3}


@dataclass(frozen=True)
class Recipe:
    """The settings of one task.

    - task: the task's name, as in `fedtune init --task`
    - title: the first line of study.toml
    - records: a description of the task's public records
    - model: the base
    - lora, objective: the lines of these tables in study.toml
    - start, steps: learning rate and number of the steps on public records, before the first round
    - longest: the largest learning rate of the round at the sites
    - judged: the lines of [evaluation] about the metric; None: accuracy if there are few different
      answers, else loss
    - lead: the text before each answer
    - narrow: whether only few directions are trained if the noise is above LOUD"""

    task: str
    title: str
    records: str
    model: str
    lora: str
    objective: str
    start: float
    steps: int = 5
    longest: float = LONGEST
    judged: str | None = None
    lead: str = ""
    narrow: bool = False

    def study(self, name: str, records: Records, public: Mapping[str, _public.Rows]) -> str:
        """Return the text of study.toml. name: the study's name. public: the name of each part of
        the public records -> its rows. Errors: ConfigError (too few public records)."""
        if "public" not in public:
            found = sum(map(len, public.values()))
            raise ConfigError(
                f"there are too few public {self.records}: {found or 'none'}",
                f"at least {_public.LEAST} of them: without them a small model learns next to "
                "nothing under differential privacy",
                "--evaluation FILE with public records, in the columns of the sites' own",
            )
        judged = self.judged or _public.judged_by(public, records.target, self.lead)
        what = {
            "public": f"# public {self.records}, learnt from before the round",
            "selection": "# public records that choose how far the round moves the adapter",
            "evaluation": "# public records that only judge the result",
        }
        columns = presets.column_lines(self.task, records)
        narrow = self.narrow and noise_of_mean(records) >= LOUD
        values = presets.head(
            records,
            title=self.title,
            name=quote_string(name),
            model=quote_string(records.base or self.model),
            lora=self.lora,
            objective=self.objective,
            start=self.start,
            steps=self.steps,
            rate=f"{learning_rate(records, self.longest, narrow=narrow):.3g}",
            narrow=NARROW if narrow else "",
            most=f"\nmax_records_per_unit = {RECORDS}" if records.patient else "",
            tables=_public.tables(what, public, columns, judged),
        )
        return STUDY.format_map(values)


def noise_of_mean(records: Records) -> float:
    """Compute the standard deviation of the noise in the mean of the sites' updates, in units of
    the clipping norm. For K sites of n units it is σ√K / (K n), and less if the sites share the
    noise."""
    sigma = calibrate(records.epsilon, records.delta, 1.0, 1)
    return sigma * records.noise_of_sum / sum(records.declared_sizes)


def learning_rate(records: Records, longest: float = LONGEST, *, narrow: bool = False) -> float:
    """Compute the learning rate, at most `longest`, at which the noise in each weight has the
    standard deviation NOISE (NARROW_NOISE if `narrow`). At the learning rates that were best on
    MedQuAD, at ε from 0.5 to 8, this standard deviation was 0.21 to 0.36."""
    if narrow:
        return min(NARROW_LONGEST, NARROW_NOISE / noise_of_mean(records))
    return min(longest, NOISE / noise_of_mean(records))


NARROW = """\
narrow = true                        # trains few directions only, since the noise is large
"""
STUDY = """\
# {title}, trained at the sites under differential privacy. `fedtune init` without
# --task writes every key with a comment.
[study]
name = {name}

[base]
model = {model}

[lora]
{lora}
train = "B"
a_init = "public"                    # the frozen factor comes from [public]

[lora.preconditioner]                # from [public] too: makes steps in all directions alike
{narrow}
[objective]
{objective}

[start]                              # costs no ε
steps = {steps:<28} # on [public], before the round
learning_rate = {start}

[training]
rounds = 1                           # one long step learns more under noise than several short ones
sampling_rate = 1.0                  # every unit
learning_rate = {rate:<20} # follows the plan's noise

[clipping]
max_grad_norm = 1.0
mode = "normalised"

[privacy]
epsilon = {epsilon}                        # sites allow 8: room for the round that a crash repeats
delta = {delta:<28} # {rule}
unit = "{unit}"{most}

{sharing}[strategy]
{least}weights = "declared"
{tables}"""
