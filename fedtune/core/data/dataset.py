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
    """A token sequence and its targets.

    input_ids: (L,) int32. target_ids: (L,) int32, the token that position t must predict, or -100
    if position t has no loss."""

    input_ids: Ids
    target_ids: Ids


class SoftTargets(NamedTuple):
    """A teacher's k outcomes, with their probabilities, at each of the P targets of one record. A
    record whose target is a label has P = 1.

    - tokens: (P, k) int32, token ids or indices of labels
    - logp: (P, k) fp32, their log-probabilities"""

    tokens: Ids
    logp: npt.NDArray[np.float32]


@dataclass(frozen=True, repr=False, eq=False)
class Example:
    """A tokenised record.

    - input_ids, target_ids: as for Passage
    - label: index in objective.labels; of a judged completion 1 (desirable) or 0; else -100
    - unit: the number of the record's unit, in 0..n_units-1
    - rejected: for a preference pair, the same prompt with the worse completion; else None
    - media: the record's image, recording or clip, if it has one
    - tiles: the number of tiles into which the base splits that file; 1 without a file
    - soft: a teacher's targets, if there is a teacher
    - cut: the number of tokens left out so that the record fits objective.max_length
    - groups: for a held-out record, the index of its group on each axis of the plan; -1 if none

    Where tokens are predicted, the last target is not an input: no loss reads the state after it.
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
        """Return the record's passages: one, or the two of a preference pair."""
        passage = Passage(self.input_ids, self.target_ids)
        return (passage,) if self.rejected is None else (passage, self.rejected)


class Failed(NamedTuple):
    """A rejected row and the reason, a fixed text. Only the site's own screen shows it.

    - file: the file's name without its folder; it may hold a patient's name
    - row: the row as a spreadsheet counts it (the header is row 1), for JSONL the line, for other
      formats a number from 1; 0 if the whole file is rejected"""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, repr=False, eq=False)
class Counts:
    """Counts of what became of a dataset's rows. Only people at the site see them.

    - rows: all rows
    - filtered: rows that data.filter left out
    - withheld: rows of patients who did not consent
    - duplicates: records with the content of an earlier record, of any patient
    - over_cap: usable records over their patient's max_records_per_unit
    - excluded: records of patients who withdrew or take part elsewhere
    - failed: the rejected rows

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
    """The examples of a dataset. Those of one unit stand together, and the units are in the order
    of their first record.

    - rejected: the number of rejected rows, by reason
    - keys: the key of each unit, in the form that the ledger hashes
    - members: the identifiers (byte strings) that the site's ledger stores as hashes. They identify
      the patients that train, the contents of records, and which record belongs to which unit
    - trained: those of `members` by which a later load of the dataset prefers records that trained
      before: the patients' keys and, for at most load.REMEMBERED records of a unit, which record
      belongs to which unit
    - content_hash: a hash over all members, in any order
    - counts: what became of the rows"""

    examples: list[Example]
    n_units: int
    rejected: Counter[str]
    members: frozenset[bytes] = frozenset()
    keys: tuple[bytes, ...] = ()
    counts: Counts = Counts()
    trained: frozenset[bytes] = frozenset()

    @property
    def n_cut(self) -> int:
        """The number of examples that were cut to objective.max_length."""
        return sum(example.cut > 0 for example in self.examples)

    @property
    def share_read(self) -> float:
        """The share of a record's tokens that is read, as the median over all records; 1 if there
        are none."""
        shares = [
            len(example.input_ids) / (len(example.input_ids) + example.cut)
            for example in self.examples
        ]
        return float(np.median(shares)) if shares else 1.0

    def exclude_units(self, is_excluded: Callable[[bytes], bool]) -> Dataset:
        """Return the dataset without the units for whose key `is_excluded` is true. `members`,
        `trained` and `counts` stay the same."""
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
        """Return, for each unit, the indices of its examples."""
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for index, example in enumerate(self.examples):
            groups[example.unit].append(index)
        return groups
