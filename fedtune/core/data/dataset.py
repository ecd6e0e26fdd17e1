"""Define tokenised records, and the dataset that training reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.core.data.media import Media

Ids = npt.NDArray[np.int32]
NO_TARGET = -100


class Passage(NamedTuple):
    """A sequence of tokens and, for each of its L positions, the token that is to be predicted
    there.

    - input_ids: (L,) int32, the tokens
    - target_ids: (L,) int32, the token that position t must predict, or -100 if position t has no
      loss"""

    input_ids: Ids
    target_ids: Ids


class SoftTargets(NamedTuple):
    """The k most probable outcomes by a teacher model, with their probabilities, at each of the P
    targets of one record. A record whose target is a label has P = 1.

    - tokens: (P, k) int32, token ids or indices of labels
    - logp: (P, k) fp32, their log-probabilities"""

    tokens: Ids
    logp: npt.NDArray[np.float32]


@dataclass(frozen=True, repr=False, eq=False)
class Example:
    """A tokenised record.

    - input_ids: (L,) int32, the record's tokens
    - target_ids: (L,) int32, the token that position t must predict, or -100 if it has no loss
    - label: the label's index in objective.labels; for a completion that was judged, 1 if it is
      desirable, else 0; -100 if the record has neither a label nor a judgement
    - unit: the number of the record's unit, in 0..n_units-1
    - rejected: for a preference pair, the prompt with the worse completion; input_ids and
      target_ids then hold the prompt with the better one. None for every other record
    - media: the record's image, recording or clip, if it has one
    - tiles: the number of tiles into which the base splits that file; 1 without a file
    - soft: the targets that a teacher model gives; None if there is no teacher
    - cut: the number of tokens left out so that the record fits objective.max_length
    - groups: for a held-out record, the index of its group on each axis of the plan; -1 if none

    If tokens are predicted, input_ids lacks the text's last token, which is a target only: no loss
    reads the network's state after it.
    """

    input_ids: Ids
    target_ids: Ids
    label: int
    unit: int
    rejected: Passage | None = None
    media: Media | None = None
    tiles: int = 1
    soft: SoftTargets | None = None
    cut: int = 0
    groups: tuple[int, ...] = ()

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The record's token sequences: one or, for a preference pair, two, the better completion's
        first."""
        passage = Passage(self.input_ids, self.target_ids)
        return (passage,) if self.rejected is None else (passage, self.rejected)


class Failed(NamedTuple):
    """A rejected row. Only the site's own screen shows it.

    - file: the file's name without its folder; it may hold a patient's name
    - row: for CSV the number that a spreadsheet shows (the header is row 1); for JSON Lines the
      line's number; for other formats a number from 1; 0 if the whole file is rejected
    - reason: why the row is rejected, one of a fixed list of texts"""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, repr=False, eq=False)
class Counts:
    """What became of the rows of a dataset. Only people at the site see this. All fields are
    numbers except `failed`.

    - rows: how many rows there are in all
    - filtered: rows that data.filter left out
    - withheld: rows of patients who did not consent
    - duplicates: records with the content of an earlier record, of any patient
    - over_cap: usable records left out because their patient has more than max_records_per_unit
    - excluded: records of patients who withdrew or take part elsewhere
    - failed: the rejected rows, one object each

    Guarantee: neither training nor anything that leaves the site depends on these counts."""

    rows: int = 0
    filtered: int = 0
    withheld: int = 0
    duplicates: int = 0
    over_cap: int = 0
    excluded: int = 0
    failed: tuple[Failed, ...] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """A site's or a study's data as training reads it: examples, i.e. tokenised records, and what
    the ledger must remember of them.

    - examples: those of one unit stand together, and the units are in the order of their first
      record
    - n_units: the number of units
    - rejected: the number of rejected rows, by reason
    - members: byte strings that identify the patients who train, the contents of records, and
      which record belongs to which unit. The site's ledger stores their hashes
    - keys: the key of each unit, in the form that the ledger hashes
    - counts: what became of the rows
    - trained: those of `members` that say who trained: the patients' keys and, for at most
      load.REMEMBERED records of a unit, which record belongs to which unit. A later load of the
      dataset prefers these records
    - content_hash: a hash over all `members`, whatever their order"""

    examples: list[Example]
    n_units: int
    rejected: Counter[str]
    members: frozenset[bytes] = frozenset()
    keys: tuple[bytes, ...] = ()
    counts: Counts = Counts()
    trained: frozenset[bytes] = frozenset()

    @property
    def n_cut(self) -> int:
        """The number of examples from which tokens were left out to fit objective.max_length."""
        return sum(example.cut > 0 for example in self.examples)

    @property
    def share_read(self) -> float:
        """What share of a record's tokens is read, from 0 to 1: the median over all records; 1 if
        there are no records."""
        shares = [
            len(example.input_ids) / (len(example.input_ids) + example.cut)
            for example in self.examples
        ]
        return float(np.median(shares)) if shares else 1.0

    def exclude_units(self, is_excluded: Callable[[bytes], bool]) -> Dataset:
        """Return a copy of the dataset without the units for which is_excluded(key) is true. Its
        `members`, `trained` and `counts` are still those of all units."""
        remaining = [old for old, key in enumerate(self.keys) if not is_excluded(key)]
        new_index = {old: index for index, old in enumerate(remaining)}
        examples = [
            replace(e, unit=new_index[e.unit]) for e in self.examples if e.unit in new_index
        ]
        keys = tuple(self.keys[old] for old in remaining)
        return replace(self, examples=examples, n_units=len(remaining), keys=keys)

    @cached_property
    def content_hash(self) -> str:
        total = hashlib.sha256()
        for member in sorted(self.members):
            total.update(hashlib.sha256(member).digest())
        return "sha256:" + total.hexdigest()

    @cached_property
    def by_unit(self) -> list[list[int]]:
        """For each unit, the list of the indices of its examples in `examples`."""
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for index, example in enumerate(self.examples):
            groups[example.unit].append(index)
        return groups
