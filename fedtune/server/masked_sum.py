"""Add up the masked updates ("words", integers modulo a power of two) of a set of sites at the
coordinator. The masks cancel in the sum of the whole set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtune.core.secagg.masks import Words, centre_words, dtype_of
from fedtune.core.secagg.statement import Ready


class MaskedSum:
    """The running sum of the masked words of a set of sites. Each site counts once. The sum needs
    as much memory as one site's words.

    - statements: the sites' signed statements, one for each site of the set
    - dimension: d, the number of words of a site
    - bits: the number of bits of a word"""

    def __init__(self, statements: Sequence[Ready], dimension: int, bits: int) -> None:
        self.statements = {ready.site: ready for ready in statements}
        self.bits = bits
        self._total = np.zeros(dimension, dtype_of(bits))
        self._added: set[str] = set()

    @property
    def missing(self) -> list[str]:
        """The names of the sites whose words have not arrived, sorted."""
        return sorted(set(self.statements) - self._added)

    def add(self, site: str, words: Words) -> None:
        """Add the masked words of one site to the sum. Errors: ValueError if the site is not in the
        set, or its words were added already."""
        if site not in self.statements or site in self._added:
            raise ValueError(f"{site}: sends masked words that were not asked for")
        self._total += words
        self._added.add(site)

    def open(self) -> npt.NDArray[np.int64]:
        """Return the sum of all sites' words, in which the masks have cancelled: the noised sum as
        integers, (d,). Errors: ValueError while words are missing, since a partial sum is still
        masked, and therefore uniformly random."""
        if self.missing:
            raise ValueError("some sites of the round have not sent their masked sums")
        return centre_words(self._total)
