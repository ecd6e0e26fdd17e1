"""Decode a few frames of a clip, evenly spaced in time, with PyAV (FFmpeg's libraries).

The file's first bytes choose the demuxer from a short list. The decoders are from a short list too,
and each runs in one thread. No other file, address or protocol is opened. A clip that is too long
or too large is rejected here, with a reason of its own; time and memory are limited by the child
process (children.py)."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedtune.core.data.files import Rejected
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 8  # number of frames that are read of a clip, however long it is
PIXELS = 2**22  # most pixels of one frame, by the header
DECODED = 2_000_000_000  # pixels of all coded frames, by the header: 32 s of 1080p at 30 a second
PACKETS = 20_000  # most coded frames of the video stream
STREAMS = 8  # most streams: video, sound, subtitles
DECODERS = "h264,hevc,mjpeg,mpeg4,vp8,vp9"
EXTRA = "pip install 'fedtune[video]'"

UNREADABLE, LARGE, LONG = "unreadable video", "video too large", "video too long"
_STRICT = {"err_detect": "explode"}  # an error that a decoder would conceal counts
_OPTIONS = {
    **_STRICT,
    "max_pixels": str(2 * PIXELS),
    "codec_whitelist": DECODERS,
    "max_streams": str(STREAMS),
    "protocol_whitelist": "none",
    "threads": "1",
}


def import_pyav() -> Any:
    """Import PyAV, and return it. Errors: ConfigError if it is not installed."""
    try:
        import av
    except ImportError:
        raise ConfigError("video columns need PyAV, which is not installed", todo=EXTRA) from None
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
    """Decode a clip, and return for each of FRAMES times, evenly spaced, the frame that is shown
    then. When the clip begins and ends follows from the times in its packets. Errors: Rejected. av:
    the module PyAV."""
    times, pixels = [], 0
    with _opened(av, body) as (container, stream):
        for packet in _first(container.demux(stream)):
            if packet.size:
                times.append(packet.pts)
                pixels += stream.width * stream.height
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


def _first(items: Iterator[Any]) -> Iterator[Any]:
    """Yield packets or frames, at most PACKETS + 1 of them: after a clip's last packet comes one
    that is empty. Errors: Rejected if there are more."""
    for number, item in enumerate(items):
        if number > PACKETS:  # the empty one asks the decoder for the frames it still holds
            raise Rejected(LONG)
        yield item


@contextmanager
def _opened(av: Any, body: bytes) -> Iterator[tuple[Any, Any]]:
    """A context manager that opens a clip, and yields its container and its first video stream.
    Another file that the clip may name is not opened. av: the module PyAV; body: the clip's
    content. Errors: Rejected."""

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
        stream.codec_context.options = _STRICT
        stream.thread_count = 1
        yield container, stream


def _demuxer(body: bytes) -> str:
    """Return the name of the FFmpeg demuxer that reads a file, chosen by the file's first bytes.
    Errors: Rejected if they are those of no known format."""
    if body[4:8] == b"ftyp":
        return "mov"
    if body[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if body[:4] == b"RIFF" and body[8:12] == b"AVI ":
        return "avi"
    raise Rejected(UNREADABLE)


def _picture(frame: Any) -> Image:
    """Return a frame as an upright image in RGB."""
    image: Image = frame.to_image(threads=1)
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 90 == 0 else image
