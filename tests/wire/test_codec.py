"""The stated error of each encoding, over numbers that nobody would send; and strict decoding."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune.core.config import Encoding
from fedtune.core.wire import codec
from fedtune.core.wire.arrays import unpack_arrays
from fedtune.core.wire.codec import BLOCK, GROWTH, SCALES, VALUES, WireError, decode, encode, layout
from fedtune.flower.records import to_record

ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "int8")
SMALL: tuple[Encoding, ...] = ("float16", "int8")
TINY, HUGE = 2.0**-149, float(np.finfo(np.float32).max)
ODD = (0, 1, 2, 255, 256, 257, 511, 513)
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, TINY, -TINY, 190 * TINY, 2.0**-126, 1.0, HUGE, -HUGE]),
)


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    """Any numbers; or noise at any scale, perhaps with one number far beyond the others."""
    size = draw(st.sampled_from(ODD))
    if draw(st.booleans()):
        return draw(arrays(np.float32, size, elements=NUMBERS, fill=NUMBERS))
    noise = np.random.default_rng(draw(st.integers(0, 99))).normal(size=size)
    found = np.clip(noise * 2.0 ** draw(st.integers(-150, 126)), -HUGE, HUGE).astype(np.float32)
    if size and draw(st.booleans()):
        found[draw(st.integers(0, size - 1))] = draw(NUMBERS)
    return found


def bound(x: np.ndarray, encoding: Encoding) -> np.ndarray:
    """The table in codec.py, number by number, in fp64."""
    exact = np.abs(x.astype(np.float64))
    if encoding == "float32" or not x.size:
        return np.zeros_like(exact)
    if encoding == "float16":
        return np.maximum(exact * 2.0**-11, largest_of(exact) * 2.0**-39)
    return largest_of(exact) / 254 * (1 + 2.0**-15) + 2.0**-127


def largest_of(exact: np.ndarray) -> np.ndarray:
    """Of each number's block."""
    starts = range(0, exact.size, BLOCK)
    return np.concatenate(
        [np.full(exact[i : i + BLOCK].size, exact[i : i + BLOCK].max()) for i in starts]
    )


def within(x: np.ndarray, encoding: Encoding) -> bool:
    """Whether `x` comes back as the table says, over Flower's own record."""
    back = decode(unpack_arrays(to_record(encode({"x": x}, encoding))), {"x": x.shape})["x"]
    assert back.dtype == np.float32 and back.shape == x.shape and np.isfinite(back).all()
    error = back.astype(np.float64) - x.astype(np.float64)
    length = math.hypot(*x.astype(np.float64).ravel())
    grown = math.hypot(*back.astype(np.float64).ravel())
    fits = grown <= length * GROWTH[encoding] + 2.0**-127 * math.sqrt(x.size)
    return bool((np.abs(error) <= bound(x.ravel(), encoding).reshape(x.shape)).all()) and fits


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=400, deadline=None)
@given(x=tensors())
def test_every_number_comes_back_within_the_stated_error(encoding: Encoding, x: np.ndarray):
    assert within(x, encoding)


TWINS: dict[str, tuple[Encoding, str, Callable[..., object]]] = {
    "cut off, not rounded": ("int8", "np.rint", lambda _: np.trunc),
    "the next block's scale": (
        "int8", "_int8_scale", lambda honest: lambda largest: honest(np.roll(largest, 1)),
    ),
    "one scale for all blocks": (
        "int8", "_int8_scale",
        lambda honest: lambda largest: honest(np.full_like(largest, largest.max(initial=0))),
    ),
    "a scale that is rounded up": (
        "int8", "_int8_scale",
        lambda honest: lambda largest: np.ldexp(
            np.float32(1), np.frexp(honest(largest))[1]
        ).astype(np.float32),
    ),
    "no scale": (
        "float16", "_float16_scale", lambda _: lambda largest: np.ones_like(largest),
    ),
    "a scale that lets numbers become subnormal": (
        "float16", "_float16_scale",
        lambda honest: lambda largest: honest(largest) * np.float32(2**20),
    ),
}  # fmt: skip


@pytest.mark.parametrize("twin", TWINS)
def test_a_worse_encoding_is_caught(twin: str, monkeypatch: pytest.MonkeyPatch):
    encoding, name, worse = TWINS[twin]
    rng = np.random.default_rng(0)
    x = (rng.normal(size=600) * np.where(np.arange(600) < 300, 1, 1e-4)).astype(np.float32)
    assert within(x, encoding)
    if name == "np.rint":
        monkeypatch.setattr(np, "rint", worse(np.rint))
    else:
        monkeypatch.setattr(codec, name, worse(getattr(codec, name)))
    assert not within(x, encoding)


def test_the_same_numbers_give_the_same_bytes_in_any_order_and_layout():
    rng = np.random.default_rng(1)
    one = {n: rng.normal(size=(7, 33)).astype(np.float32) for n in ("b", "a")}
    other = {n: np.asfortranarray(one[n]) for n in ("a", "b")}
    for encoding in ENCODINGS:
        first, second = (to_record(encode(a, encoding)) for a in (one, other))
        assert {n: a.data for n, a in first.items()} == {n: a.data for n, a in second.items()}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_layout_is_what_is_sent(encoding: Encoding):
    shapes = {"b": (3, 200), "a": (), "c": (0, 4), "d": (256,)}
    like = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    sent = encode(like, encoding)
    forms = layout(shapes, encoding)
    assert {n: (a.dtype.name, a.shape, a.nbytes) for n, a in sent.items()} == {
        n: (f.dtype, f.shape, f.nbytes) for n, f in forms.items()
    }
    assert {n: a.shape for n, a in decode(sent, shapes).items()} == shapes
    if encoding != "float32":
        assert forms[SCALES].shape == (3 + 1 + 0 + 1,)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_each_tensor_gets_its_own_numbers_back(encoding: Encoding):
    like = {name: np.full((3, 5), at, np.float32) for at, name in enumerate("cab", 1)}
    back = decode(encode(like, encoding), {name: (3, 5) for name in "bca"})
    found = {name: {round(float(x), 5) for x in array.ravel()} for name, array in back.items()}
    assert found == {"a": {2.0}, "b": {3.0}, "c": {1.0}}


@pytest.mark.parametrize("encoding", SMALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_is_refused(encoding: Encoding, bad: float):
    x = np.ones(600, np.float32)
    x[5] = bad
    with pytest.raises(WireError, match="not a positive number"):
        decode(encode({"x": x}, encoding), {"x": x.shape})


REFUSED: dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "no scales": lambda e: {VALUES: e[VALUES]},
    "a scale too few": lambda e: e | {SCALES: e[SCALES][1:]},
    "a scale too many": lambda e: e | {SCALES: np.append(e[SCALES], np.float32(1))},
    "scales in two rows": lambda e: e | {SCALES: e[SCALES][None]},
    "a scale of zero": lambda e: e | {SCALES: e[SCALES] * 0},
    "a negative scale": lambda e: e | {SCALES: -e[SCALES]},
    "an infinite scale": lambda e: e | {SCALES: e[SCALES] * np.float32(np.inf)},
    "scales of another type": lambda e: e | {SCALES: e[SCALES].astype(np.float16)},
    "scales beside fp32": lambda e: e | {VALUES: np.zeros(600, np.float32)},
    "an array too many": lambda e: e | {"y": np.zeros(1, np.float32)},
    "a number too many": lambda e: e | {VALUES: np.append(e[VALUES], e[VALUES][:1])},
    "a number too few": lambda e: e | {VALUES: e[VALUES][1:]},
    "two rows": lambda e: e | {VALUES: e[VALUES].reshape(2, 300)},
    "scales alone": lambda e: {SCALES: e[SCALES]},
}


@pytest.mark.parametrize("encoding", SMALL)
@pytest.mark.parametrize("how", REFUSED)
def test_what_is_no_encoding_is_refused(encoding: Encoding, how: str):
    honest = encode({"x": np.ones(600, np.float32)}, encoding)
    assert (decode(honest, {"x": (600,)})["x"] == 1).all()
    with pytest.raises(WireError):
        decode(REFUSED[how](honest), {"x": (600,)})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounding_is_done_once_whatever_the_number_of_rounds(encoding: Encoding):
    """The coordinator's adapter stays fp32; the twin keeps what it sent, and loses every update
    that is smaller than half a unit of it."""
    step = np.full(512, 2e-4, np.float32)  # of an adapter of length 1, for 200 rounds
    start = np.random.default_rng(2).uniform(0.5, 1.0, 512).astype(np.float32)
    kept, twin = start.copy(), start.copy()

    def sent(adapter: np.ndarray) -> np.ndarray:
        return decode(encode({"x": adapter}, encoding), {"x": adapter.shape})["x"]

    for _ in range(200):
        received = sent(kept)
        trained = received + step
        kept = kept + sent(trained - received)
        twin = sent(twin + step)
    wanted = start + 200 * step
    assert np.abs(kept - wanted).max() <= 200 * 1e-3 * 2e-4 + 1e-5
    assert np.abs(sent(kept) - wanted).max() <= bound(wanted, encoding).max() + 1e-4
    if encoding != "float32":
        assert np.abs(twin - wanted).max() > 10 * np.abs(kept - wanted).max()
