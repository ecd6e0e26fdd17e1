"""The settings of three tasks: labelling preferences, RLOO and distillation. The command line takes
its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.core.config import ObjectiveTable

RUBRIC = "Which answer is more accurate, complete and clearly written?"


@dataclass(frozen=True)
class LabelSettings:
    """Settings of labelling preferences.

    - new_tokens: maximum number of new tokens in an answer
    - max_length: maximum number of tokens of prompt and answer together
    - temperature: sampling temperature of the answers
    - seed: decides, together with the record's prompt, which answers are sampled
    - template: the text around a prompt, with {text} in the prompt's place; use that of the study
      that will train on the preferences. None: if a run writes the answers, its study's template;
      if a base does, a user turn of its chat template, or nothing if it has none

    >>> import fedtune
    >>> fedtune.LabelSettings(temperature=0.7).new_tokens
    64
    """

    new_tokens: int = 64
    max_length: int = 1024
    temperature: float = 1.0
    seed: int = 0
    template: str | None = None

    @property
    def objective(self) -> ObjectiveTable:
        from fedtune.core.config import ObjectiveTable

        return ObjectiveTable(
            name="causal_lm", max_length=self.max_length, template=self.template, append_eos=True
        )


@dataclass(frozen=True)
class RlooSettings:
    """Settings of training a policy by RLOO, a method of reinforcement learning.

    - steps: number of steps
    - prompts: the number of prompts in a step
    - answers: the number of sampled answers to each prompt
    - new_tokens: maximum number of new tokens in an answer
    - learning_rate: AdamW's learning rate, the same in all steps
    - kl_coef: the penalty, in units of reward, for each nat of KL divergence from the starting
      policy
    - temperature: sampling temperature of the answers
    - seed: decides how the prompts are split, and which answers are sampled

    >>> import fedtune
    >>> fedtune.RlooSettings(steps=10).answers
    4
    """

    steps: int = 60
    prompts: int = 8
    answers: int = 4
    new_tokens: int = 32
    learning_rate: float = 2e-4
    kl_coef: float = 0.2
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class DistillSettings:
    """Settings of distillation: the student's adapter, and its training.

    - rank, last_layers: the rank of the student's adapter, and how many of the last layers get one
      (0: all). None: the value in the first teacher's adapter if the student is that teacher with
      fewer layers; otherwise rank 16, and all layers
    - modules: names of the modules that get an adapter; (): those of the first teacher's adapter if
      last_layers is taken from it too, otherwise the usual ones for the base's kind
    - epochs: how often each prompt is trained on
    - batch: the number of prompts in a step
    - learning_rate: AdamW's highest learning rate; it rises and falls by a schedule
    - temperature: softmax temperature of teacher and student
    - top: a soft target keeps this many of the teachers' likeliest next tokens
    - new_tokens: maximum number of tokens that the teacher writes for a prompt without a completion
    - seed: decides the adapter's random values, the choice of the held-out prompts, the order of
      training and the teacher's answers

    >>> import fedtune
    >>> fedtune.DistillSettings(epochs=3).temperature
    1.0
    """

    rank: int | None = None
    last_layers: int | None = None
    modules: tuple[str, ...] = ()
    epochs: int = 10
    batch: int = 8
    learning_rate: float = 1e-3
    temperature: float = 1.0
    top: int = 64
    new_tokens: int = 64
    seed: int = 0
