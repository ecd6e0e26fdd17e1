"""Define the interface of a training objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Network(Protocol):
    """The network's methods that an objective uses: states, logits, losses, adapter on or off.

    Shapes: B records, L positions, H hidden, n selected positions, V vocabulary or classes."""

    @property
    def has_head(self) -> bool:
        """Whether a classification head is trained, in place of the model's own."""

    def hidden(
        self,
        prefix: torch.Tensor,
        mask: torch.Tensor,
        keep: torch.Tensor | None = None,
        tower_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute last hidden states from the states at the cut: at all positions, (B, L, H), or at
        some, (B, K, H). B is here the number of passages: a record of k passages has k rows.

        - prefix: (B, L, H), the states at the cut
        - mask: (B, L) bool, False on padding
        - keep: (B, K) int64, the chosen positions of each row; None: all positions
        - tower_states: the states of each row's file, as `Batch` describes them; None if the
          network reads no file above the cut"""

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool hidden states to one vector for each row, (B, H) fp32. hidden: (B, L, H); mask: (B,
        L) bool, False on padding."""

    def logits(self, selected: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, V) fp32 of n states (n, H): of the classes if a head is trained, else
        of the next token."""

    def token_losses(self, selected: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Compute the negative log-likelihood (nats) of the next tokens `targets` (n,) from n
        states (n, H): (n,) fp32."""

    def class_sums(self, vectors: torch.Tensor, count_weight: float) -> torch.Tensor:
        """Compute each record's product with the trained sums of each class, (B, V) fp32. The
        product with class c is linear in these sums. Its gradient is a matrix with the record's
        features (shortened to length 1 at most) and `count_weight` in row c, and zeros elsewhere.

        - vectors: the base's vectors of B records, (B, H)
        - count_weight: what a record adds to its class's count"""

    def base_only(self) -> AbstractContextManager[None]:
        """A context manager: disable the adapter within the block."""


@dataclass(frozen=True, repr=False)
class Batch:
    """A micro-batch of B records of k passages each. The passages, R = B · k rows, are in the order
    of the records, and padded on the right to one length L. All tensors are on the network's
    device, except index and reference_logps, which are on the CPU.

    - prefix: (R, L, H), the states at the cut
    - mask: (R, L) bool, False on padding
    - target_ids: (R, L), the token to predict after each position; -100 where there is no loss
    - label: (B,), the index of the record's label; for a judged answer 1 (desirable) or 0; else
      -100
    - index: (B,), the records' numbers in their dataset
    - soft: a teacher's soft targets, as a pair: the token ids (or labels) and their
      log-probabilities. Both are (R, targets, outcomes), zero beyond a record's last target; None
      without a teacher
    - tower_states: (R, tiles, P, W): for each tile of a passage's file, P states of length W; None
      unless the network's `reads_tower`
    - tiles: the number of tiles of every record of the batch
    - count: the number of real records; the records after them are copies of the first, to fill a
      block
    - reference_logps: each passage's log-likelihood under the frozen base, for all N records of the
      dataset, (N, k), NaN until it is computed; None if these likelihoods are not kept"""

    prefix: torch.Tensor
    mask: torch.Tensor
    target_ids: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    soft: tuple[torch.Tensor, torch.Tensor] | None = None
    tower_states: torch.Tensor | None = None
    tiles: int = 1
    count: int = 0
    reference_logps: torch.Tensor | None = None


# text: prompt and completion, or plain text; label: text and one of the labels; preference: a
# prompt, the better and the worse completion; unpaired_preference: a completion and whether it is
# desirable.
RecordFormat = Literal["text", "label", "preference", "unpaired_preference"]
READS: dict[RecordFormat, str] = {
    "text": "prompts with their completions, conversations, or plain text",
    "label": "texts, each with one of the study's labels",
    "preference": "pairs, a prompt with a better and a worse answer (columns prompt, chosen, "
    "rejected); a pair is one record: the gradient of its two answers together is clipped once",
    "unpaired_preference": "judged answers, each desirable or not (columns prompt, completion, "
    "label)",
}


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose predictions a student learns.

    - name, digest: the model's name, and its digest, by which it is found
    - temperature: the temperature of its soft targets
    - top: how many next tokens each soft target has"""

    name: str
    digest: str
    temperature: float = 1.0
    top: int = 64


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A training objective: a per-record loss, and the record format that it reads.

    Subclasses are frozen dataclasses. The fields that they add are study.objective.options,
    typed by their defaults; `__post_init__` checks their range. A person at a site reads the first
    paragraph of the subclass's docstring before signing. labels: objective.labels.
    Guarantee that a subclass must keep, and that `fedtune check-plugin` measures: a record's loss
    depends on that record alone, and is deterministic."""

    labels: tuple[str, ...] = ()

    @property
    @abstractmethod
    def record_format(self) -> RecordFormat:
        """What a record holds, one of the names in READS. Most subclasses define it as a class
        attribute."""

    @property
    def outputs(self) -> int:
        """Number of outputs of the trained head; 0: the model's own head."""
        return 0

    @property
    def directions(self) -> int:
        """Number of public directions in which a site sums its records' vectors by class; 0 if the
        site sends a change of the adapter instead."""
        return 0

    @property
    def count_weight(self) -> float:
        """What a record adds to its class's count, if class statistics are sent."""
        return 0.0

    @property
    def scores(self) -> bool:
        """Whether the trained head gives a text a score, rather than one of the labels."""
        return self.outputs > 0 and self.record_format != "label"

    @property
    def teacher_spec(self) -> Teacher | None:
        """The teacher whose soft targets each record carries; None without one."""
        return None

    def may_run_beside(self, batch: Batch) -> bool:
        """Return whether `losses` may run on this batch while another thread runs it on another
        batch. It may if it neither disables the adapter nor writes anything but its result. To
        return False costs time only."""
        return False

    @abstractmethod
    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each record, (B,) fp32.

        - network: the network that is trained
        - batch: the B records"""


# Bound on every number by which an objective multiplies a record's outputs. With a larger factor,
# rounding in a product's last digits would change the gradient, as with a large entry of an
# adapter.
LARGEST = 100.0


def require(condition: bool, option: str, expected: str) -> None:
    """Raise an error unless `condition` holds. option: the option's name; expected: the range that
    is allowed, in words. Errors: ConfigError that names both."""
    if not condition:
        raise ConfigError(f"objective.options.{option} is out of range", expected)
