"""What is read of a clip is bounded whatever a decoder says, and no error of it goes out: with a
decoder that is not there (test_video.py has the real one)."""

from __future__ import annotations

import itertools
import struct
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


class Shown(SimpleNamespace):
    def __bytes__(self) -> bytes:
        return bytes(self.body)

    def has_sidedata(self, _: str) -> bool:
        return bool(self.more)


def shown(pts: Any, size: tuple[int, int] = (32, 24), **more: Any) -> Any:
    """A frame, and the packet that holds it."""
    picture = SimpleNamespace(size=size)
    values = {"pts": pts, "size": 1, "width": size[0], "height": size[1], "is_corrupt": False}
    values |= {"rotation": 1, "to_image": lambda threads: picture, "body": b"\0", "more": b""}
    return Shown(**values | more)


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
    pixels = (1920 + video.BORDER) * (1080 + video.BORDER)
    assert decoder.asked == video.DECODED // pixels + 1
    assert len(decoder.opened) == 1, "they are counted before one is decoded: some are not shown"


def test_a_vp9_packet_counts_as_its_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A superframe has up to eight, of which one is shown."""
    size, context = (1920, 1080), SimpleNamespace(name="vp9", options={})

    def packets(last: int) -> Iterator[Any]:
        return (shown(n, size, body=bytes([0, last])) for n in range(200))

    usual = Decoder(lambda: packets(0x5F), size, codec_context=context)
    assert len(frames_of(monkeypatch, usual)) == video.FRAMES
    eight = Decoder(lambda: packets(0xC7), size, codec_context=context)
    assert reason(monkeypatch, eight) == "video too long"
    assert eight.asked == video.DECODED // (8 * (1920 + video.BORDER) * (1080 + video.BORDER)) + 1


SLICE, OTHER = {"h264": b"\x41\x9a", "hevc": b"\x02\x01"}, {"h264": b"\x06", "hevc": b"\x40\x01"}
RECORD = b"\1" + b"\3" * 30  # of a decoder's configuration: lengths of four bytes


def with_lengths(*units: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def asked_for(monkeypatch: pytest.MonkeyPatch, codec: str, body: bytes, record: bytes) -> Any:
    """Return how many packets are read of 200 that hold `body`, or why none is."""
    size, context = (1920, 1080), SimpleNamespace(name=codec, options={}, extradata=record)
    packets = Decoder(
        lambda: (shown(n, size, body=body) for n in range(200)), size, codec_context=context
    )
    monkeypatch.setattr(video, "import_pyav", lambda: packets)
    try:
        video.decode_frames(AVI)
    except Rejected as rejected:
        return packets.asked if rejected.reason == "video too long" else rejected.reason
    return packets.asked


def test_a_packet_counts_as_all_that_it_has_to_be_read_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg reads any number of H.264 fields, or slices, of 13 bytes each in one packet, and of
    scans in one JPEG: 113 kB took 9 s, and 64 MiB hours. It finds units by start codes inside those
    that have lengths, too."""
    most = video.DECODED // (8 * (1920 + video.BORDER) * (1080 + video.BORDER)) + 1
    for codec, unit in SLICE.items():
        few, many = [unit] * 4, [unit] * 8 * video.PIECES
        by_code = b"\0\0\0\1" + b"\0\0\1".join(many)
        hidden = with_lengths(OTHER[codec] + by_code)
        for body, record in (
            (by_code, b""), (with_lengths(*many), RECORD), (hidden, RECORD),
            (b"\0\0\1" + OTHER[codec] + by_code, b"\0\0\1" + unit),
        ):  # fmt: skip
            assert asked_for(monkeypatch, codec, body, record) == most
        if codec == "h264":  # FFmpeg looks for start codes beside a record of another version
            long = b"\0\0\1" + unit + bytes(256 + unit[0] - 2)  # a length that hides such a code
            assert (
                asked_for(monkeypatch, codec, long * 8 * video.PIECES, b"\2" + RECORD[1:]) == most
            )
        others = [OTHER[codec]] * 999
        for body in (with_lengths(*few), with_lengths(*few, *others)):
            assert asked_for(monkeypatch, codec, body, RECORD) == 200
    scan = b"\xff\xda\0\x08"
    assert asked_for(monkeypatch, "mjpeg", scan * 8 * video.PIECES, b"") == most
    assert asked_for(monkeypatch, "mjpeg", scan * 3, b"") == 200
    assert asked_for(monkeypatch, "mpeg4", scan * 999, b"") == 200


@pytest.mark.parametrize(
    "broken", ["cut", "more", "two bytes", "another record", "a record", "endless"]
)
def test_units_of_other_lengths_are_not_read(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    body, record, more = with_lengths(SLICE["h264"] * 9), RECORD, b""
    if broken == "cut":
        body = body[:-1]
    elif broken == "more":
        body += b"\0\0\0"
    elif broken == "two bytes":
        record = b"\1" * 31
    elif broken == "another record":
        more = b"\1"
    elif broken == "a record":  # a unit of 16 MiB, whose length begins like a record
        body = with_lengths(bytes(2**24))
    else:
        body = bytes(4) * (video.PACKETS + 1)
    context = SimpleNamespace(name="h264", options={}, extradata=record)
    decoder = Decoder(lambda: [shown(0, body=body, more=more)], codec_context=context)
    assert reason(monkeypatch, decoder) == "unreadable video"
    assert len(decoder.opened) == 1


def test_a_coded_frame_is_hardly_larger_than_its_header_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Decoder(lambda: [shown(0)], (320, 240))
    frames_of(monkeypatch, decoder)
    most = int(decoder._stream.codec_context.options["max_pixels"])
    assert most == (320 + video.BORDER) * (240 + video.BORDER)


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


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def tables(count: int, name: bytes = b"stsz") -> bytes:
    """An MP4 file with a table of so many entries, none of which is there."""
    inner = box(b"trak", box(name, bytes(8) + struct.pack(">I", count)))
    return box(b"ftyp") + box(b"moov", inner)


@pytest.mark.parametrize("name", [b"stsz", b"stz2"])
def test_a_table_is_judged_before_memory_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    decoder = Decoder(lambda: [shown(0)])
    assert len(frames_of(monkeypatch, decoder, tables(video.PACKETS, name))) == video.FRAMES
    decoder.opened.clear()
    for count in (video.PACKETS + 1, 80_000_000, 2**32 - 1):
        assert reason(monkeypatch, decoder, tables(count, name)) == "video too long"
    assert not decoder.opened


def chunks(samples: int, count: int, name: bytes = b"stco") -> bytes:
    """An MP4 file with so many chunks of so many samples each."""
    each = struct.pack(">IIIII", 0, 1, 1, samples, 1)
    places = box(name, struct.pack(">II", 0, count))
    return box(b"ftyp") + box(b"moov", box(b"trak", box(b"stsc", each) + places))


@pytest.mark.parametrize("name", [b"stco", b"co64"])
def test_samples_of_sound_are_judged_before_memory_is_made_for_them(
    monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    """FFmpeg keeps a row of an index for each 1,024 samples of a chunk: 35 kB took a gigabyte."""
    decoder = Decoder(lambda: [shown(0)])
    for samples, count in ((48_000, 1000), (1, video.PACKETS)):
        assert len(frames_of(monkeypatch, decoder, chunks(samples, count, name))) == video.FRAMES
    decoder.opened.clear()
    for samples, count in ((2**31 - 1, 1), (2**20, 65), (1, video.PACKETS + 1)):
        assert reason(monkeypatch, decoder, chunks(samples, count, name)) == "video too long"
    many = (b"stsc" + struct.pack(">II", 0, video.PACKETS)) * (video.TABLES + 1)

    def walked(table: bytes, *_: Any) -> int:
        return pytest.fail("walked") if b"stsc" in table else 0

    monkeypatch.setattr(video, "_most_in", walked)
    assert reason(monkeypatch, decoder, box(b"ftyp") + box(b"moov", many)) == "video too long"
    assert not decoder.opened


def test_only_what_lies_outside_the_frames_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = b"stsz" + b"\xff" * 12
    decoder = Decoder(lambda: [shown(0)])
    wide = struct.pack(">I", 1) + b"mdat" + struct.pack(">Q", 16 + len(table)) + table
    for frames in (box(b"mdat", table), wide, struct.pack(">I", 0) + b"mdat" + table):
        assert frames_of(monkeypatch, decoder, box(b"ftyp") + frames)
    for more in (box(b"free", table), wide + box(b"moov", table)):
        assert reason(monkeypatch, decoder, box(b"ftyp") + more) == "video too long"
    hidden = (box(b"moov", box(name)) for name in video._FRAGMENTS)
    for broken in (*hidden, box(b"moov", b"cmov"), struct.pack(">I", 7) + b"mdat" * 9):
        assert reason(monkeypatch, decoder, box(b"ftyp") + broken) == "unreadable video"
