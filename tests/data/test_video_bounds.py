"""What is read of a clip is bounded whatever a decoder says, and no error of it goes out: with a
decoder that is not there (test_video.py has the real one)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.data import video
from fedtune.core.data.files import Rejected

AVI = b"RIFF\0\0\0\0AVI "
MOST = 200_000  # items after which a stream counts as endless


class Decoder:
    """Stands for PyAV: a stream of `frames`, of which it counts those that were asked for."""

    def __init__(
        self, frames: Callable[[], Iterable[Any]], size: tuple[int, int] = (32, 24), **stream: Any
    ) -> None:
        self._frames, self.asked, self.opened = frames, 0, list[dict[str, Any]]()
        self.stream = SimpleNamespace(Disposition=SimpleNamespace(attached_pic=1024))
        self._stream = SimpleNamespace(
            codec_context=SimpleNamespace(name="h264", options={}, extradata=None),
            disposition=0,
            width=size[0],
            height=size[1],
        )
        vars(self._stream).update(stream)

    @contextmanager
    def open(self, _: Any, **given: Any) -> Iterator[Any]:
        self.opened.append(given)
        self.asked = 0
        streams = SimpleNamespace(video=[self._stream])
        yield SimpleNamespace(streams=streams, demux=self._read, decode=self._read)

    def _read(self, _: Any) -> Iterator[Any]:
        for frame in self._frames():
            self.asked += 1
            if self.asked > MOST:
                pytest.fail("read on and on")
            yield frame


def shown(pts: Any, size: tuple[int, int] = (32, 24), **more: Any) -> Any:
    """A frame, and the packet that holds it."""
    picture = SimpleNamespace(size=size)
    values = {"pts": pts, "size": 1, "width": size[0], "height": size[1], "is_corrupt": False}
    values |= {"rotation": 1, "to_image": lambda threads: picture}
    return SimpleNamespace(**values | more)


def frames_of(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, body: bytes = AVI) -> list[Any]:
    monkeypatch.setattr(video, "import_pyav", lambda: decoder)
    return video.decode_frames(body)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 300])
def test_every_clip_has_as_many_frames(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    decoder = Decoder(lambda: map(shown, range(count)))
    assert len(frames_of(monkeypatch, decoder)) == video.FRAMES


@pytest.mark.parametrize(
    "times",
    [
        [0, 1, 2, 2**62],
        [-(2**62), 0, 2**62],
        [5, 5, 5],
        [9, 3, 7, 1],  # a decoder that does not keep the order of time
        [2**62, 0],
    ],
)
def test_times_decide_nothing_but_which_frames(
    monkeypatch: pytest.MonkeyPatch, times: list[int]
) -> None:
    assert len(frames_of(monkeypatch, Decoder(lambda: map(shown, times)))) == video.FRAMES


def reason(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, body: bytes = AVI) -> str:
    with pytest.raises(Rejected) as found:
        frames_of(monkeypatch, decoder, body)
    return found.value.reason


def test_an_endless_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(lambda: map(shown, itertools.count()))
    assert reason(monkeypatch, decoder) == "video too long"
    assert decoder.asked <= video.PACKETS + 2


def test_the_pixels_of_all_frames_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (1920, 1080)
    decoder = Decoder(lambda: (shown(n, size) for n in range(1000)), size)
    assert reason(monkeypatch, decoder) == "video too long"
    assert decoder.asked == video.DECODED // (1920 * 1080) + 1
    assert len(decoder.opened) == 1, "they are counted before one is decoded: some are not shown"


@pytest.mark.parametrize("where", ["header", "frame"])
def test_a_frame_is_judged_before_it_is_converted(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    large = (4096, 4096)
    size = large if where == "header" else (32, 24)
    decoder = Decoder(lambda: [shown(0), shown(1, large)], size)
    assert reason(monkeypatch, decoder) == "video too large"


@pytest.mark.parametrize(
    "broken",
    [
        [],
        [shown(None)],
        [shown(Fraction(1, 3), is_corrupt=True)],
        [shown(0, to_image=None)],
        [object()],
    ],
    ids=["no frame", "no time", "corrupt", "no picture", "no packet"],
)
def test_what_a_decoder_gives_may_be_anything(
    monkeypatch: pytest.MonkeyPatch, broken: list[Any]
) -> None:
    assert reason(monkeypatch, Decoder(lambda: broken)) == "unreadable video"


@pytest.mark.parametrize(
    "error", [ValueError, OSError, RuntimeError, StopIteration, UnicodeError, MemoryError]
)
def test_no_error_of_a_decoder_goes_out(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(threads: int) -> None:
        raise error("Mrs Adler")

    expected = "video too large" if error is MemoryError else "unreadable video"
    decoder = Decoder(lambda: [shown(0, to_image=fail)])
    monkeypatch.setattr(video, "import_pyav", lambda: decoder)
    try:
        found = video.decode_frames(AVI)
    except Rejected as rejected:
        found = rejected.reason
    except Exception as escaped:
        found = type(escaped).__name__
    assert found == expected


def test_a_format_is_named_and_nothing_else_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a short list, by the first bytes; FFmpeg never guesses."""
    decoder = Decoder(lambda: [shown(0)])
    bodies = {"avi": AVI, "matroska": b"\x1a\x45\xdf\xa3", "mov": b"\0\0\0\x08ftyp"}
    for name, body in bodies.items():
        frames_of(monkeypatch, decoder, body)
        assert [given["format"] for given in decoder.opened] == [name] * 2
        for given in decoder.opened:
            assert given["options"]["protocol_whitelist"] == "none"
            assert given["options"]["codec_whitelist"] == video.DECODERS
            with pytest.raises(PermissionError):
                given["io_open"]("http://site", 0, {})
        decoder.opened.clear()
    for body in (b"", b"#EXTM3U\n", b"ffconcat version 1.0\n", b"GIF89a", b"RIFF\0\0\0\0WAVE"):
        assert reason(monkeypatch, decoder, body) == "unreadable video"
    assert not decoder.opened


@pytest.mark.parametrize(
    "stream", [{"disposition": 1024}, {"codec_context": SimpleNamespace(name="gif")}]
)
def test_a_cover_or_another_codec_is_no_clip(
    monkeypatch: pytest.MonkeyPatch, stream: dict[str, Any]
) -> None:
    decoder = Decoder(lambda: [shown(0)], **stream)
    assert reason(monkeypatch, decoder) == "unreadable video"
