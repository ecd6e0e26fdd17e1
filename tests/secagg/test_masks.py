"""Masked words look uniform, one message or all but one of them, and the whole sum is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from fedtune.core.secagg import masks
from fedtune.core.secagg.masks import centre_words
from fedtune.core.secagg.statement import Draw, Ready
from fedtune.core.wire.keys import SigningKey
from fedtune.server.masked_sum import MaskedSum
from tests import chance

DIGEST = "sha256:" + "0" * 64
LONG = masks._CHUNK + 30_000  # words: beyond the first stretch of a keystream


@lru_cache
def sites(count: int = 4) -> tuple[list[Any], list[Ready]]:
    keys = [masks.new_key() for _ in range(count)]
    said = []
    for number, key in enumerate(keys):
        signing = SigningKey()
        ready = Ready(
            Draw(DIGEST, 1, 1, DIGEST), f"s{number}", 9, signing.public, masks.public_of(key)
        )
        said.append(ready.signed(signing))
    return keys, said


def masked(totals: list[np.ndarray], bits: int = 32) -> list[np.ndarray]:
    keys, said = sites(len(totals))
    each = zip(totals, keys, said, strict=True)
    return [masks.mask(total, key, mine, said, bits) for total, key, mine in each]


def is_uniform(words: np.ndarray, samples: int = 2) -> bool:
    """Whether χ² tests pass: of bytes in each place of a word, of words' high bits, of the
    difference from the word before. samples: how many of them a test looks at."""
    width = words.dtype.itemsize
    places = words.view(np.uint8).reshape(-1, width)
    differences = (words[1:] - words[:-1]).view(np.uint8).reshape(-1, width)[::2]
    groups = [*places.T, *differences.T, (words >> (8 * width - 6)).astype(np.uint8)]
    groups += [places[-20_000:, n] for n in range(width)]  # the end of the keystream
    found = []
    for group, cells in [(g, 64 if n == 2 * width else 256) for n, g in enumerate(groups)]:
        counts = np.bincount(group, minlength=cells)
        expected = len(group) / cells
        found.append(chi2.sf(((counts - expected) ** 2 / expected).sum(), cells - 1))
    return min(found) > chance.FALSE_ALARM / len(found) / samples


SUMS: dict[str, Callable[[], np.ndarray]] = {
    "zero": lambda: np.zeros(LONG, np.int64),
    "a constant": lambda: np.full(LONG, 12_345, np.int64),
    "negative": lambda: np.full(LONG, -1, np.int64),
    "a ramp": lambda: np.arange(LONG, dtype=np.int64),
    "noise": lambda: np.rint(np.random.default_rng(0).normal(size=LONG) * 2**16).astype(np.int64),
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("what", SUMS)
def test_one_message_and_all_but_one_are_uniform(what: str, bits: int) -> None:
    total = SUMS[what]()
    sent = masked([total] * 3, bits)
    assert is_uniform(sent[0])
    assert is_uniform(sent[0] + sent[1]), "without the third"
    assert (centre_words(sent[0] + sent[1] + sent[2]) == 3 * total).all()


def test_the_test_of_uniformity_sees_a_sum_that_is_not_masked() -> None:
    """Twins: no mask; a mask that ends early, repeats, or is one for all words; two messages under
    one key, whose difference is that of their sums."""
    total = SUMS["noise"]()
    plain = total.astype(np.uint32)
    (first, other), (again, _) = masked([total, total]), masked([total + 5, total])
    short = np.concatenate([first[:-20_000], plain[-20_000:]])
    repeated = np.tile(first[: LONG // 64], 65)[:LONG]
    for twin in (plain, short, repeated, plain + first[0], again - first):
        assert not is_uniform(twin)
    assert is_uniform(other)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_whole_sum_is_exact(count: int, bits: int) -> None:
    draw = np.random.default_rng(1)
    totals = [draw.integers(-(2**20), 2**20, 1000) for _ in range(count)]
    _, said = sites(count)
    opened = MaskedSum(said, 1000, bits)
    for ready, words in zip(said, masked(totals, bits), strict=True):
        with pytest.raises(ValueError, match="have not sent"):
            opened.open()
        opened.add(ready.site, words)
        with pytest.raises(ValueError, match="not asked for"):
            opened.add(ready.site, words)
    assert (opened.open() == sum(totals)).all()


def test_a_sum_beyond_the_words_wraps_and_is_not_clamped() -> None:
    """Modulo 2³², whatever it is: post-processing of the sum."""
    huge = np.array([2**31, 2**33 + 7, -(2**31) - 1, -(2**62), 5], np.int64)
    keys, said = sites(2)
    each = zip((huge, huge * 0), keys, said, strict=True)
    sent = [masks.mask(total, key, mine, said, 32) for total, key, mine in each]
    assert (sent[0] + sent[1] == huge.astype(np.uint64).astype(np.uint32)).all()


def test_a_set_with_another_member_has_other_masks() -> None:
    """H(P) is in every pair's key: words for two sets never cancel."""
    keys, said = sites(4)
    zero = np.zeros(1000, np.int64)
    four = masks.mask(zero, keys[0], said[0], said, 32)
    three = masks.mask(zero, keys[0], said[0], said[:3], 32)
    fourth = four - three
    alone = masks.mask(zero, keys[0], said[0], [said[0], said[3]], 32)
    assert (fourth != alone).mean() > 0.99


def test_a_truncated_keystream_does_not_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, said = sites(3)
    zero = np.zeros(1000, np.int64)
    sent = masked([zero] * 3)
    real = masks._keystream

    def short(key: bytes, size: int, bits: int) -> Iterator[Any]:
        yield from real(key, size // 2, bits)

    monkeypatch.setattr(masks, "_keystream", short)
    lying = masks.mask(zero, keys[2], said[2], said, 32)
    opened = centre_words(sent[0] + sent[1] + lying)
    assert (opened[:500] == 0).all() and (np.abs(opened[500:]) > 2**16).mean() > 0.99
