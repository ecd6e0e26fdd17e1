"""The settings of labelling preferences, of RLOO and of distillation, with the defaults that the
command line reads."""

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
    - seed: decides the sampled answers, together with the record's prompt
    - template: the text around a prompt, with {text} in the prompt's place, as in the study that
      will train on the preferences. None: the template of the study whose run writes the answers
      or, for a base with a chat template, a user turn of it

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
    """Settings of training a policy by RLOO.

    - steps: number of steps
    - prompts, answers: the number of prompts in a step, and of sampled answers to each
    - new_tokens: maximum number of new tokens in an answer
    - learning_rate: AdamW's learning rate, the same in all steps
    - kl_coef: penalty, in units of reward, for each nat of KL from the starting policy
    - temperature: sampling temperature of the answers
    - seed: decides the split of the prompts and the sampled answers

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

    - rank, last_layers: the adapter's rank, and the number of last layers that get one (0: all).
      None: as in the first teacher's adapter if the student is that teacher with fewer layers; else
      rank 16 in all layers
    - modules: names of the modules that get an adapter; (): as in the first teacher's adapter if
      last_layers comes from there, too, else the usual ones for the base's kind
    - epochs, batch: how often each prompt is trained on, and the number of prompts in a step
    - learning_rate: AdamW's highest learning rate; it rises and falls by a schedule
    - temperature: softmax temperature of teacher and student
    - top: how many of the teachers' likeliest next tokens a soft target has
    - new_tokens: maximum length of the teacher's answer to a prompt without a completion
    - seed: decides the adapter's random values, the held-out prompts, the order of training and the
      teacher's answers

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
