"""Settings of labelling, RLOO and distillation, with the defaults that the command line reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.core.config import ObjectiveTable

RUBRIC = "Which answer is more accurate, complete and clearly written?"


@dataclass(frozen=True)
class LabelSettings:
    """How preferences are written.

    new_tokens: of an answer at most; max_length: of prompt and answer together, tokens; seed: of
    the draws, with the record's own prompt; template: round the prompt, as in the DPO study. None:
    a chat turn of the generator's, if it has a chat template; a run's own.

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
    """How a policy is trained by RLOO.

    steps of `prompts` prompts with `answers` answers each; kl_coef: what a nat of KL to the start
    costs in units of reward; temperature: of the answers.

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
    """The student's adapter, and how it is trained.

    new_tokens: of the teacher's answer to a prompt without a completion. last_layers 0: adapters in
    all layers. None: as the first teacher has it, where the student is that teacher with fewer
    layers; else rank 16 in all layers.

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
