"""What an objective is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Network(Protocol):
    """What an objective asks of a network: states, logits and losses, adapter on or off.

    Shapes: B records, L positions, H hidden, n selected positions, V vocabulary or classes."""

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained, in place of the model's own."""

    def hidden(
        self,
        prefix: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states (B, L, H), or at the positions `keep` alone."""

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One vector per record, (B, H) fp32."""

    def logits(self, selected: torch.Tensor) -> torch.Tensor:
        """Logits (n, V) fp32 of selected states (n, H)."""

    def token_losses(self, selected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood (nats) of next tokens, (n,) fp32."""

    def base_only(self) -> AbstractContextManager[None]:
        """The frozen base in the block, the adapter off."""


@dataclass(frozen=True, repr=False)
class Batch:
    """B records of k passages each, one record's after another, padded on the right to one length
    L: R = B·k rows. prefix (R, L, H); mask (R, L) bool, False on padding; target_ids (R, L), -100
    where no loss; label (B,), -100 where none; index (B,), on the processor, the others on the
    network's device; soft: of a taught record's P targets the outcomes and log-probabilities, each
    (R, P, k), zero beyond its own. seen: (R, tiles, P, W), the tower's states of each passage's
    file, where the network above the cut reads them; every record of a batch has the same number
    of tiles. count: how many records are meant; those beyond it are the first one again, which
    fill a block and count for nobody. before: (N, k), on the processor, of all N records of the
    dataset: what each passage's log-likelihood is to the frozen base, NaN until somebody asked."""

    prefix: torch.Tensor
    mask: torch.Tensor
    target_ids: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    soft: tuple[torch.Tensor, torch.Tensor] | None = None
    seen: torch.Tensor | None = None
    tiles: int = 1
    count: int = 0
    before: torch.Tensor | None = None


# text: prompt and completion, or plain text; label: text and one of the labels; preference: a
# prompt, the better and the worse completion; unpaired_preference: a completion and whether it is
# desirable.
RecordFormat = Literal["text", "label", "preference", "unpaired_preference"]
READS: dict[RecordFormat, str] = {
    "text": "prompts with their completions, conversations, or plain text",
    "label": "texts, each with one of the study's labels",
    "preference": "pairs, a prompt with a better and a worse answer (columns prompt, chosen, "
    "rejected); a pair is one record: what its two answers add up to is clipped once",
    "unpaired_preference": "judged answers, each desirable or not (columns prompt, completion, "
    "label)",
}


@dataclass(frozen=True)
class Teacher:
    """A frozen model by name and digest; at what temperature it is heard, and how many of its next
    tokens."""

    name: str
    digest: str
    temperature: float = 1.0
    top: int = 64


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is learned from a record, and from which.

    Subclasses are frozen dataclasses. The fields that they add are study.objective.options, whose
    defaults say of which type each is; `__post_init__` checks their range. The first paragraph of
    their docstring is what a site reads of it before it signs. labels: objective.labels.
    Guarantee that a subclass must keep, and `fedtune check-plugin` measures: a record's loss
    depends on that record alone, and comes out the same each time."""

    labels: tuple[str, ...] = ()

    @property
    @abstractmethod
    def record_format(self) -> RecordFormat:
        """What a record must say. Most subclasses have a class attribute."""

    @property
    def outputs(self) -> int:
        """Rows of the head that is trained; 0: the model's own head."""
        return 0

    @property
    def taught_by(self) -> Teacher | None:
        """Whose figures each record carries as targets."""
        return None

    @abstractmethod
    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """The loss of each record, (B,) fp32."""


def require(condition: bool, option: str, expected: str) -> None:
    """Errors: ConfigError unless `condition`."""
    if not condition:
        raise ConfigError(f"objective.options.{option} is out of range", expected)
