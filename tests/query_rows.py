"""Rows of a question that a test gives, in place of those that a site makes of its records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedtune.core.config import Study
from fedtune.core.models.cache import CachedDataset
from fedtune.core.vault.evaluation import UnitRows


class GivenRows:
    """The rows of a tensor, (units, numbers)."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    @property
    def dimension(self) -> int:
        return self._rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def of_units(self, units: Sequence[int]) -> torch.Tensor:
        return self._rows[list(units)]

    def wipe(self) -> None:
        self._rows.zero_()


def all_rows(study: Study, data: CachedDataset) -> torch.Tensor:
    """Return the row of every unit, as a site makes it."""
    rows = UnitRows(study, data)
    return rows.of_units(range(len(rows)))
