"""Read and check the image, audio and video files that records name, each once.

A path is relative to the data file's folder and must lie inside it once every link is followed.
A record whose file cannot be used is rejected for a reason from a fixed list; neither the file's
name nor its content is shown."""

from __future__ import annotations

import hashlib
import io
import re
import wave
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedtune.core.data.files import Rejected
from fedtune.core.data.video import decode_frames
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Samples = npt.NDArray[np.float32]

BYTES = 64 * 2**20  # of one file
PIXELS = 40_000_000  # of one image, from its header, before any is decoded
# The longer side by the shorter: an image processor that scales the shorter side to a fixed length
# would turn a line of pixels into an image of any size.
ASPECT = 20
# Of one JPEG, as in libtiff: a scan of a few bytes may go over all pixels. The pairs of bytes that
# begin a scan are counted wherever they stand in the file, because libjpeg also finds scans where a
# reader of segments would not look.
SCANS = 100
SCAN = b"\xff\xda"
# Of any image: EXIF segments of a JPEG and colour profiles of a PNG, which Pillow reads one by one.
# With each EXIF segment it copies all earlier ones.
REPEATED, MOST_REPEATED = (b"Exif\0\0", b"iCCP"), 100
SEGMENT = re.compile(rb"\xff[\xe0-\xef\xfe]")  # of a JPEG, for an application or a comment
SEGMENTS = 10_000  # of a JPEG, or chunks of a PNG: Pillow keeps an object of each
TAGS = 4_096  # of a TIFF
# Of one TIFF: its strips or tiles, and the pixels that all of them cover; both may be far more than
# the image has.
PIECES = 2**16
COVERED = 4 * PIXELS
STRIPS, TILES = 273, 324  # the tags of their places
TILE_WIDTH, TILE_LENGTH = 322, 323
SECONDS = 30.0  # of one recording
RATES = (4_000, 192_000)  # samples a second
CHANNELS = 16  # of one recording
ORIENTATION = 0x0112  # of EXIF: how the image has to be turned
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
EXTRA = "pip install 'fedtune[media]'"


@dataclass(frozen=True, repr=False, eq=False)
class Media:
    """An image, audio or video file that can be decoded. body: its bytes; digest: their sha256."""

    kind: Kind
    body: bytes
    digest: bytes


class Folder:
    """The files under one folder. Each is read and decoded once, however many records name it."""

    def __init__(self, root: Path) -> None:
        self._root, self._cache = root.resolve(), dict[tuple[Path, str], Media | str]()

    def read(self, name: str, kind: Kind) -> Media:
        """Return the file of this name, read and checked. Errors: Rejected; ConfigError if the
        extra that decodes it is not installed."""
        path = self._inside(name)
        if (path, kind) not in self._cache:
            try:
                self._cache[path, kind] = load(path, kind)
            except Rejected as error:
                self._cache[path, kind] = error.reason
        media = self._cache[path, kind]
        if isinstance(media, str):
            raise Rejected(media)
        return media

    def _inside(self, name: str) -> Path:
        try:
            path = (self._root / name).resolve()
            if Path(name).is_absolute() or not path.is_relative_to(self._root):
                raise Rejected("media file outside the folder")
            if not path.is_file():
                raise Rejected("missing media file")
        except (OSError, RuntimeError):  # too long a name; a loop of links
            raise Rejected("missing media file") from None
        return path


def import_decoders(kind: Kind) -> None:
    """Import everything that decodes files of a kind, before the first file is read. Which modules
    a process imports can be seen by its reads from disk, and must not depend on a record."""
    with suppress(ImportError, OSError):  # where one is not installed, its files are rejected
        if kind != "audio":
            from PIL import Image, ImageOps  # noqa: F401

            Image.init()
            if kind == "video":
                import av  # noqa: F401
            return
        import scipy.signal  # type: ignore[import-untyped]  # noqa: F401
        import soundfile  # noqa: F401


def load(path: Path, kind: Kind) -> Media:
    """Read the file at `path`, and decode it once to check that this is possible. Errors: as
    Folder.read."""
    try:
        with reading.open_regular(path) as file:
            content = file.read(BYTES + 1)
    except OSError:
        raise Rejected(f"unreadable {kind}") from None
    if len(content) > BYTES:
        raise Rejected(f"{kind} too large")
    media = Media(kind, content, hashlib.sha256(content).digest())
    if kind == "image":
        picture(media)
    elif kind == "audio":
        decode_sound(media)
    else:
        clip(media)
    return media


def picture(media: Media) -> Image:
    """Decode the image: upright, in RGB. Errors: Rejected; ConfigError without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("image columns need Pillow, which is not installed", EXTRA) from None
    try:
        if any(media.body.count(mark) > MOST_REPEATED for mark in REPEATED):
            raise Rejected("image too large")
        _check_segments(media.body)
        _check_pieces(media.body)
        with Image.open(io.BytesIO(media.body), formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise Rejected("image too large")
            if _is_narrow(image):
                raise Rejected("image too narrow")
            if image.format in ("JPEG", "MPO") and media.body.count(SCAN) > SCANS:
                raise Rejected("image too large")
            if image.format == "TIFF" and _count_covered(image) > COVERED:
                raise Rejected("image too large")
            oriented = _turn_upright(image)
            if oriented.mode.startswith("I") or oriented.mode == "F":  # 16 bits and more: X-rays
                oriented = _eight_bits(oriented)
            return oriented.convert("RGB")
    except Rejected:
        raise
    except Exception as error:  # Pillow may raise anything on a broken file
        large = isinstance(error, MemoryError) or "DecompressionBomb" in type(error).__name__
        raise Rejected("image too large" if large else "unreadable image") from None


def clip(media: Media) -> list[Image]:
    """Return the sampled frames of the clip (video.FRAMES), in order, in RGB. Errors: Rejected;
    ConfigError without PyAV."""
    frames = decode_frames(media.body)
    if any(_is_narrow(frame) for frame in frames):
        raise Rejected("video too narrow")
    return frames


def _is_narrow(image: Image) -> bool:
    return max(image.size) > ASPECT * max(min(image.size), 1)


def _check_segments(body: bytes) -> None:
    """Check that a JPEG has at most SEGMENTS segments, and a PNG as many chunks. Errors:
    Rejected."""
    number = at = 0
    if body[:2] == b"\xff\xd8":
        number = sum(1 for _ in islice(SEGMENT.finditer(body), SEGMENTS + 1))
    elif body[:4] == b"\x89PNG":
        at = 8
        while at < len(body) and number <= SEGMENTS:
            at += 12 + int.from_bytes(body[at : at + 4])  # length, name, content, checksum
            number += 1
    if number > SEGMENTS:
        raise Rejected("image too large")


def _check_pieces(body: bytes) -> None:
    """Check that a TIFF has at most TAGS tags, and names at most PIECES strips or tiles, before
    Pillow makes an object of each. Errors: Rejected."""
    if body[:2] not in (b"II", b"MM"):
        return
    order: Literal["little", "big"] = "little" if body[:2] == b"II" else "big"

    def number(at: int, length: int) -> int:
        return int.from_bytes(body[at : at + length], order)

    is_wide = body[2:3] == b"\x2b"  # BigTIFF, as Pillow tells it
    first = number(8, 8) if is_wide else number(4, 4)
    length = 8 if is_wide else 4  # of a count
    start = first + (8 if is_wide else 2)
    tags, row = number(first, start - first), 4 + 2 * length
    if tags > TAGS:
        raise Rejected("image too large")
    for tag in range(start, start + row * tags, row):
        if number(tag, 2) in (STRIPS, TILES) and number(tag + 4, length) > PIECES:
            raise Rejected("image too large")


def _count_covered(image: Any) -> int:
    """Count the pixels that the strips or tiles of a TIFF cover, which are all decoded."""
    tags, (width, height) = image.tag_v2, image.size
    tile_width = max(1, int(tags.get(TILE_WIDTH, width)))
    tile_length = max(1, int(tags.get(TILE_LENGTH, height)))
    tiles = -(-width // tile_width) * -(-height // tile_length) * tile_width * tile_length
    pieces = ((right - left) * (lower - upper) for _, (left, upper, right, lower), *_ in image.tile)
    return int(max(tiles, sum(pieces)))


def _turn_upright(image: Image) -> Image:
    """Return the image as its EXIF orientation says that it is shown, before it is loaded.

    ImageOps.exif_transpose also writes all other EXIF tags again, and so does the loading of a TIFF
    file that still has an orientation: minutes for a file that is full of them."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    exif = image.getexif()
    if (turn := turns.get(exif.get(ORIENTATION, 1))) is None:
        return image
    del exif[ORIENTATION]
    return image.transpose(turn)


def _eight_bits(image: Any) -> Image:
    """Return the image in 8 bits, scaled from its own darkest to its own brightest pixel. Errors:
    Rejected if a pixel is not finite."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Rejected("unreadable image")
    low, high = float(values.min()), float(values.max())
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))


def decode_sound(media: Media, rate: int | None = None) -> Samples:
    """Return the recording's samples, (samples,) fp32 in ±1, in one channel. rate: samples per
    second to which they are converted; None: the recording's own rate.

    Errors: Rejected."""
    samples, file_rate = _waveform(media.body)
    if not len(samples) or not np.isfinite(samples).all():
        raise Rejected("unreadable audio")
    if len(samples) > SECONDS * file_rate:
        raise Rejected("audio too long")
    if rate is None or rate == file_rate:
        return samples
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, file_rate))
    return np.asarray(resample_poly(samples, rate // common, file_rate // common), dtype=np.float32)


def _waveform(body: bytes) -> tuple[Samples, int]:
    """Return a recording's samples in one channel, and their rate. PCM WAV is decoded by the
    standard library, other formats by soundfile, if it is installed. Errors: Rejected."""
    try:
        with wave.open(io.BytesIO(body)) as file:
            width = file.getsampwidth()
            channels = file.getnchannels()
            rate = file.getframerate()
            raw = file.readframes(_most_frames(rate, channels, file.getnframes()))
        return _pcm(raw, width, channels), rate
    except Rejected:
        raise
    except Exception:  # no PCM WAV; the header of a broken file can raise anything
        pass
    try:
        import soundfile
    except (ImportError, OSError):
        raise Rejected("no PCM WAV, and fedtune[media] is not installed") from None
    try:
        with soundfile.SoundFile(io.BytesIO(body)) as file:
            most = _most_frames(file.samplerate, file.channels, file.frames)
            found = file.read(most, dtype="float32", always_2d=True)
            return np.asarray(found.mean(axis=1), dtype=np.float32), int(file.samplerate)
    except Rejected:
        raise
    except Exception:
        raise Rejected("unreadable audio") from None


def _most_frames(rate: int, channels: int, frames: int) -> int:
    """Return how many frames are read of a recording with this header, before any is decoded: one
    more than it may have, whatever the header says. Errors: Rejected."""
    if not RATES[0] <= rate <= RATES[1] or not 0 < channels <= CHANNELS:
        raise Rejected("unreadable audio")
    if frames > SECONDS * rate:
        raise Rejected("audio too long")
    return int(SECONDS * rate) + 1


def _pcm(raw: bytes, width: int, channels: int) -> Samples:
    """Decode little-endian PCM to samples in ±1, averaged over channels; an incomplete frame at the
    end is left out."""
    raw = raw[: len(raw) - len(raw) % (width * channels)]
    if width == 1:
        values = np.frombuffer(raw, np.uint8).astype(np.float32) - np.float32(128)
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        values = wide.view("<i4")[:, 0].astype(np.float32) / np.float32(256)
    else:
        values = np.frombuffer(raw, f"<i{width}").astype(np.float32)
    mean = values.reshape(-1, channels).mean(axis=1) / float(2 ** (8 * width - 1))
    return np.asarray(mean, dtype=np.float32)
