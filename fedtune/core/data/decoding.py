"""Decode an image, a recording or a clip to plain numbers. The child processes of media_process.py
run this.

The libraries that decode will read whatever file a record names, also a hostile one. So they run in
a child that has nothing to steal, may use at most a minute of processor time and a gibibyte of
memory, and can end no process but itself. Its answer is not trusted: media.py checks every part."""

from __future__ import annotations

import importlib
import io
import pkgutil
import struct
import wave
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.core.data.files import Rejected
from fedtune.core.data.media import (
    CHANNELS,
    DECODED,
    EXTRA,
    LARGE_IMAGE,
    LONG_AUDIO,
    NO_DECODER,
    PIXELS,
    RATES,
    REJECTED,
    SECONDS,
    SIZE,
    UNREADABLE_AUDIO,
    UNREADABLE_IMAGE,
    Kind,
    Samples,
)
from fedtune.core.data.video import decode_frames, import_pyav
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112  # EXIF tag that says how the image has to be turned
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def import_decoders(kind: Kind) -> None:
    """Import every module that decodes files of a kind, before a child is forked that may open no
    file. kind: "image", "audio" or "video". Errors: ConfigError if a library that every file of
    this kind needs is not installed."""
    if kind == "audio":
        with suppress(ImportError, OSError):  # without soundfile, only PCM WAV is decoded
            import soundfile  # noqa: F401
        return
    try:
        import PIL
        from PIL import Image
    except ImportError:
        raise ConfigError(
            f"{kind} columns need Pillow, which is not installed", todo=EXTRA
        ) from None
    _import_all(PIL)
    Image.init()
    if kind == "video":
        _import_all(import_pyav())


def _import_all(package: Any) -> None:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "Tk", "Qt")):  # no windows
            with suppress(Exception):  # what needs another library is not used
                importlib.import_module(module.name)


def answer(kind: Kind, body: bytes) -> bytes:
    """Decode one file, and return the answer of a child process: DECODED and then the numbers in
    the form below, or REJECTED and then the reason.

    - an image: its width and height, then for each pixel red, green and blue, one byte each
    - a recording: its rate, then its samples, little-endian float32
    - a clip: its frames, each in the form of an image

    body: the file's content."""
    try:
        if kind == "image":
            return DECODED + _image_bytes(decode_image(body))
        if kind == "video":
            return DECODED + b"".join(_image_bytes(frame) for frame in decode_frames(body))
        samples, rate = decode_audio(body)
        return DECODED + struct.pack("<I", rate) + samples.astype("<f4").tobytes()
    except Rejected as rejected:
        return REJECTED + rejected.reason.encode()


def _image_bytes(image: Image) -> bytes:
    return SIZE.pack(*image.size) + image.tobytes()


def decode_image(body: bytes) -> Image:
    """Decode an image file's content to an image in RGB, turned upright. Errors: Rejected if it is
    too large or cannot be decoded."""
    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(body), formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise Rejected(LARGE_IMAGE)
            oriented = _turn_upright(image)
            if oriented.mode.startswith("I") or oriented.mode == "F":  # 16 bits and more: X-rays
                oriented = _eight_bits(oriented)
            return oriented.convert("RGB")
    except Rejected:
        raise
    except Exception as error:  # Pillow may raise anything on a broken file
        large = isinstance(error, MemoryError) or "DecompressionBomb" in type(error).__name__
        raise Rejected(LARGE_IMAGE if large else UNREADABLE_IMAGE) from None


def _turn_upright(image: Image) -> Image:
    """Return the image turned or mirrored as its EXIF orientation says. Call this before the
    image's pixels are loaded.

    If a TIFF file is loaded while it has an orientation, Pillow writes all its other EXIF tags
    again, which takes minutes for a file that is full of them. So the orientation is removed before
    the image is loaded, and Pillow's ImageOps.exif_transpose, which also writes the tags again, is
    not used."""
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
    """Return an image of 16 or more bits in 8 bits, scaled so that its own darkest pixel is 0 and
    its own brightest 255. Errors: Rejected if a pixel is not finite."""
    from PIL import Image

    values = np.array(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Rejected(UNREADABLE_IMAGE)
    low, high = float(values.min()), float(values.max())
    values -= low  # in place, since a child has little memory
    values *= 255 / max(high - low, 1e-9)
    return Image.fromarray(values.astype(np.uint8))


def decode_audio(body: bytes) -> tuple[Samples, int]:
    """Decode a recording's content. Return its samples, (samples,) fp32 in one channel, and its
    rate in samples per second. PCM WAV is decoded by the standard library, other formats by
    soundfile.
    Errors: Rejected if the file is too long, broken, or needs soundfile, which is not installed."""
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
        raise Rejected(NO_DECODER) from None
    try:
        with soundfile.SoundFile(io.BytesIO(body)) as file:
            most = _most_frames(file.samplerate, file.channels, file.frames)
            found = file.read(most, dtype="float32", always_2d=True)
            return np.asarray(found.mean(axis=1), dtype=np.float32), int(file.samplerate)
    except Rejected:
        raise
    except Exception:
        raise Rejected(UNREADABLE_AUDIO) from None


def _most_frames(rate: int, channels: int, frames: int) -> int:
    """Return how many frames to read of a recording: one more than the longest allowed recording
    has, even if its header names fewer, since the header may be wrong.

    - rate, channels, frames: what the file's header says, before anything is decoded

    Errors: Rejected if the header names an unusable rate or number of channels, or too many frames.
    """
    if not RATES[0] <= rate <= RATES[1] or not 0 < channels <= CHANNELS:
        raise Rejected(UNREADABLE_AUDIO)
    if frames > SECONDS * rate:
        raise Rejected(LONG_AUDIO)
    return int(SECONDS * rate) + 1


def _pcm(raw: bytes, width: int, channels: int) -> Samples:
    """Decode little-endian PCM to samples between -1 and 1, (samples,) fp32, the average of the
    channels. An incomplete frame at the end is left out. width: the bytes of one channel's sample.
    """
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
