"""Tokenised records, and the dataset that training reads."""

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
    without a loss."""

    input_ids: Ids
    target_ids: Ids


class SoftTargets(NamedTuple):
    """A teacher's outcomes (P, k) int32 (tokens, or labels) and their log-probabilities (P, k)
    fp32 at each of a record's P targets; for a label, P = 1."""

    tokens: Ids
    logp: npt.NDArray[np.float32]


@dataclass(frozen=True, repr=False, eq=False)
class Example:
    """A tokenised record.

    - input_ids, target_ids: as for Passage
    - label: index in objective.labels; 1 or 0 for desirable or not; or -100
    - unit: in 0..n_units-1
    - rejected: for a preference pair, the same prompt with the worse completion
    - media: the record's image or recording, of `tiles` tiles
    - soft: a teacher's targets
    - cut: the number of tokens left out, to fit objective.max_length
    - groups: for a held-out record, its group on each axis that a plan names, -1 if in none

    The last target is not an input, since no loss reads its state."""

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
    """A rejected row, for the site's own screen.

    file: only its name, which may hold a patient's; row: as a spreadsheet counts (the header is row
    1), for JSONL the line, for Parquet from 1."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, repr=False, eq=False)
class Counts:
    """What happened to a file's rows; only people at the site see it.

    - filtered: left out by data.filter
    - withheld: rows of patients who did not consent
    - over_cap: usable, but over their patient's max_records_per_unit
    - duplicates: records with the content of an earlier record, of any patient
    - excluded: records of units that were left out as a whole

    Guarantee: nothing that leaves the site, and nothing that trains, follows from these."""

    rows: int = 0
    filtered: int = 0
    withheld: int = 0
    duplicates: int = 0
    over_cap: int = 0
    excluded: int = 0
    failed: tuple[Failed, ...] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """Examples, with those of a unit together and units in the order of their first record; and the
    number of rejected records by reason.

    - keys: the key of each unit, as the ledger hashes it
    - members: what the site's ledger remembers, hashed, of the records that train: keys, contents,
      and which records belong to whom
    - trained: the members by which a later reading chooses: patients' keys, and which records
      belong to whom, of each patient as many as the ledger's reserve holds
    - content_hash: of all members, in no order
    - counts: what happened to the rows"""

    examples: list[Example]
    n_units: int
    rejected: Counter[str]
    members: frozenset[bytes] = frozenset()
    keys: tuple[bytes, ...] = ()
    counts: Counts = Counts()
    trained: frozenset[bytes] = frozenset()

    @property
    def n_cut(self) -> int:
        """Count the examples that were cut to objective.max_length."""
        return sum(example.cut > 0 for example in self.examples)

    @property
    def share_read(self) -> float:
        """Return the share of a median record that is read; 1 if there is none."""
        shares = [
            len(example.input_ids) / (len(example.input_ids) + example.cut)
            for example in self.examples
        ]
        return float(np.median(shares)) if shares else 1.0

    def exclude_units(self, is_excluded: Callable[[bytes], bool]) -> Dataset:
        """Return the dataset without the units whose key `is_excluded`; `members` is unchanged."""
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
        """Return the indices of each unit's examples."""
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for index, example in enumerate(self.examples):
            groups[example.unit].append(index)
        return groups
