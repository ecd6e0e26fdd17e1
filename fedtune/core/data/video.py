"""Decode a few frames of a clip, evenly spaced in time, with PyAV (FFmpeg's libraries).

The file's first bytes choose the demuxer, from a short list; the decoders are from a short list
too, and run in one thread. No other file, address or protocol is opened."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedtune.core.data.files import Rejected
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 8  # of every clip, however long it is
PIXELS = 2**22  # of one frame, by the header
DECODED = 2_000_000_000  # pixels of all coded frames, by the header: 24 s of 1080p at 30 a second
PACKETS = 20_000  # of the video stream: coded frames
PIECES = 4  # slices or scans that count as a coded frame: each may go over all of it in a few bytes
STREAMS = 8  # of video, sound, subtitles
DECODERS = "h264,hevc,mjpeg,mpeg4,vp8,vp9"  # none whose packets may hold any number of frames
BORDER = 192  # pixels that FFmpeg may want in width and height beside what a header says
EXTRA = "pip install 'fedtune[video]'"

UNREADABLE, LARGE, LONG = "unreadable video", "video too large", "video too long"
_STRICT = {"err_detect": "explode"}  # an error that a decoder would conceal counts
_OPTIONS = {
    **_STRICT,
    "max_pixels": str(2 * PIXELS),
    "codec_whitelist": DECODERS,
    "ignore_editlist": "1",  # by an edit list FFmpeg's index may outgrow the file
    "max_streams": str(STREAMS),
    "protocol_whitelist": "none",
    "threads": "1",
}
# These tables state a number of samples. A sample may take no byte of the file, but FFmpeg makes
# memory for each. By table, the offset of the number after the box's name.
_COUNTED = {b"stsz": 8, b"stz2": 8, b"stsc": 4, b"stco": 4, b"co64": 4}
TABLES = 4 * STREAMS  # of one name: each is walked
SOUND = 2**26  # samples of uncompressed sound: FFmpeg keeps a row of an index for each 1,024
# Where a NAL unit begins, and its first byte.
_UNIT = re.compile(rb"\x00\x00\x01(?=(.))", re.DOTALL)
# Boxes of a file in fragments, which may have such tables in the midst of its frames too.
_FRAGMENTS = (b"moof", b"mvex", b"trex", b"sidx", b"mfra", b"tfra")


def import_pyav() -> Any:
    """Import PyAV. Errors: ConfigError."""
    try:
        import av
    except ImportError:
        raise ConfigError("video columns need PyAV, which is not installed", EXTRA) from None
    return av


def decode_frames(body: bytes) -> list[Image]:
    """Divide the clip into FRAMES equal parts, and return the frame that is shown in the middle of
    each, in order, in RGB. A frame that is shown for long may be returned several times.

    Errors: Rejected; ConfigError without PyAV."""
    av = import_pyav()
    try:
        return [_picture(frame) for frame in _sampled(av, body)]
    except Rejected:
        raise
    except Exception as error:  # FFmpeg may refuse a broken file in any way
        raise Rejected(LARGE if isinstance(error, MemoryError) else UNREADABLE) from None


def _sampled(av: Any, body: bytes) -> list[Any]:
    """Decode the frames that are shown at the sampled times. The packets' times give the clip's
    beginning and end. Errors: Rejected."""
    times, pixels = [], 0
    with _opened(av, body) as (container, stream):
        for packet in _first(container.demux(stream)):
            if packet.size:
                times.append(packet.pts)
                pixels += _count_frames(stream, packet) * _largest_coded(stream)
                if pixels > DECODED:  # before any is decoded, as some are never shown
                    raise Rejected(LONG)
    first, span = min(times), max(times) - min(times)
    sampled = [first + (2 * part + 1) * span // (2 * FRAMES) for part in range(FRAMES)]
    found: list[Any] = []
    shown = None
    with _opened(av, body) as (container, stream):
        for frame in _first(container.decode(stream)):
            if frame.width * frame.height > PIXELS:
                raise Rejected(LARGE)
            if frame.is_corrupt:
                raise Rejected(UNREADABLE)
            while shown is not None and len(found) < FRAMES and sampled[len(found)] < frame.pts:
                found.append(shown)
            shown = frame
    if shown is None:
        raise Rejected(UNREADABLE)
    return [*found, *[shown] * (FRAMES - len(found))]


def _count_frames(stream: Any, packet: Any) -> int:
    """Count a packet's coded frames. For VP9 the last byte tells how many a superframe has (VP9
    bitstream and decoding process specification 0.6, annex B). For H.264, HEVC and MJPEG, PIECES
    slices or scans count as one frame, since FFmpeg reads any number of them. Any other packet is
    one frame. Errors: Rejected."""
    codec, body = stream.codec_context.name, bytes(packet)
    if codec == "vp9":
        return 1 + (body[-1] & 7) if body[-1] & 0xE0 == 0xC0 else 1
    if codec in ("h264", "hevc"):
        heads = (unit[1][0] for unit in _UNIT.finditer(_with_start_codes(stream, packet, body)))
        slices = (head & 31 in (1, 5) if codec == "h264" else not head & 64 for head in heads)
        return max(1, sum(slices) // PIECES)
    return max(1, body.count(b"\xff\xda") // PIECES) if codec == "mjpeg" else 1


def _with_start_codes(stream: Any, packet: Any, body: bytes) -> bytes:
    """Return a packet with a start code before each NAL unit, also if the file gives units' lengths
    instead: FFmpeg looks for start codes in either case. Errors: Rejected if a length has not four
    bytes, if the lengths do not add up to the packet, or if FFmpeg would take the packet for a new
    record of the decoder's configuration."""
    said = bytes(stream.codec_context.extradata or b"")
    is_h264 = stream.codec_context.name == "h264"
    # FFmpeg's own test for a record of the configuration. Without one there are start codes alone.
    if said[:1] != b"\1" if is_h264 else said[:3] <= b"\0\0\1":
        return body
    size = said[4 if is_h264 else 21]
    at, units = 0, [b""]
    while at < len(body) and len(units) <= PACKETS:
        end = at + 4 + int.from_bytes(body[at : at + 4])
        units.append(body[at + 4 : end])
        at = end
    another = body[:1] == b"\1" or packet.has_sidedata("new_extradata")
    if size & 3 != 3 or at != len(body) or another:
        raise Rejected(UNREADABLE)
    return b"\0\0\1".join(units)


def _largest_coded(stream: Any) -> int:
    """Return how many pixels a coded frame may have by the file's header. The decoder refuses a
    frame with more, whatever the frame's own header says."""
    return int((stream.width + BORDER) * (stream.height + BORDER))


def _first(items: Iterator[Any]) -> Iterator[Any]:
    """Yield at most PACKETS of the items. Errors: Rejected if there are more."""
    for number, item in enumerate(items):
        if number > PACKETS:  # the last is empty: it asks the decoder for what it still holds
            raise Rejected(LONG)
        yield item


@contextmanager
def _opened(av: Any, body: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a clip, and yield its container and its first video stream. No other file is opened that
    the clip may name. Errors: Rejected."""

    def refuse(*_: Any) -> None:
        raise PermissionError

    with av.open(
        io.BytesIO(body), format=_demuxer(body), options=_OPTIONS, io_open=refuse
    ) as container:
        cover = av.stream.Disposition.attached_pic
        stream = next(s for s in container.streams.video if not s.disposition & cover)
        if stream.codec_context.name not in DECODERS.split(","):
            raise Rejected(UNREADABLE)
        if stream.width * stream.height > PIXELS:
            raise Rejected(LARGE)
        stream.codec_context.options = _STRICT | {"max_pixels": str(_largest_coded(stream))}
        stream.thread_count = 1
        yield container, stream


def _demuxer(body: bytes) -> str:
    """Return the name of FFmpeg's demuxer for a file, by its first bytes. Errors: Rejected."""
    if body[4:8] == b"ftyp":
        _check_tables(body)
        return "mov"
    if body[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if body[:4] == b"RIFF" and body[8:12] == b"AVI ":
        return "avi"
    raise Rejected(UNREADABLE)


def _check_tables(body: bytes) -> None:
    """Check the tables of an MP4 file in every box outside its frames' data. Errors: Rejected if a
    table is compressed or states more than PACKETS entries, or if the file is in fragments."""
    at = 0
    while at + 8 <= len(body):
        size, name, header = int.from_bytes(body[at : at + 4]), body[at + 4 : at + 8], 8
        if size == 1:
            size, header = int.from_bytes(body[at + 8 : at + 16]), 16
        end = min(at + size, len(body)) if size else len(body)
        if end < at + header:
            raise Rejected(UNREADABLE)
        if name != b"mdat":
            _check_counts(body[at:end])
        at = end


def _check_counts(box: bytes) -> None:
    if b"cmov" in box or any(name in box for name in _FRAGMENTS):
        raise Rejected(UNREADABLE)
    if any(box.count(name) > TABLES for name in _COUNTED):
        raise Rejected(LONG)
    for name, place in _COUNTED.items():
        at = box.find(name)
        while at >= 0:
            number = at + 4 + place
            if int.from_bytes(box[number : number + 4]) > PACKETS:
                raise Rejected(LONG)
            at = box.find(name, at + 1)
    if _most_in(box, b"stsc", 12) * max(_most_in(box, b"stco"), _most_in(box, b"co64")) > SOUND:
        raise Rejected(LONG)


def _most_in(box: bytes, name: bytes, row: int = 0) -> int:
    """Return the most chunks that a table of this name states; row: its rows' length in bytes, if
    the largest second number of a row is asked for instead: the samples of a chunk."""
    most, at = 0, box.find(name)
    while at >= 0:
        count = int.from_bytes(box[at + 8 : at + 12])
        if row:
            places = range(at + 16, min(at + 12 + row * count, len(box)), row)
            count = max((int.from_bytes(box[place : place + 4]) for place in places), default=0)
        most, at = max(most, count), box.find(name, at + 1)
    return most


def _picture(frame: Any) -> Image:
    """Return a frame as an upright image in RGB."""
    image: Image = frame.to_image(threads=1)
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 90 == 0 else image
