"""Settings of labelling, RLOO and distillation, with the defaults that the command line reads."""

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
    - max_length: maximum tokens of prompt and answer together
    - seed: decides the sampled answers, together with the record's prompt
    - template: text around the prompt, as in the DPO study. None: the template of the run that
      generates, or for a base with a chat template, a user turn of it

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

    - steps: number of steps, each on `prompts` prompts with `answers` answers each
    - kl_coef: penalty, in units of reward, for each nat of KL from the starting policy
    - temperature: sampling temperature of the answers

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

    - new_tokens: maximum length of the teacher's answer to a prompt without a completion
    - rank, last_layers: the adapter's rank, and the number of last layers that get one (0: all).
      None: as in the first teacher's adapter if the student is that teacher with fewer layers;
      else rank 16 in all layers
    - temperature: softmax temperature of teacher and student

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
