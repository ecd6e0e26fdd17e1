"""Decode an image, a recording or a clip to plain numbers, in a child process (media_process.py).

The libraries that do this read any file that a record names. So they run where a hostile file finds
nothing, takes a minute of processor time and a gibibyte of memory at most, and ends no process
but its own. What such a process answers is not trusted: `parts` of it are checked by media.py."""

from __future__ import annotations

import importlib
import io
import pkgutil
import struct
import wave
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
from fedtune.core.data.video import decode_frames
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]
ORIENTATION = 0x0112  # of EXIF: how the image has to be turned
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")


def import_decoders(kind: Kind) -> None:
    """Import everything that decodes files of a kind, as a child may open no file. Errors:
    ConfigError if a library without which no file of the kind is decoded is not installed."""
    if kind == "audio":
        with suppress(ImportError, OSError):  # without it, PCM WAV alone is decoded
            import soundfile  # noqa: F401
        return
    try:
        import PIL
        from PIL import Image
    except ImportError:
        raise ConfigError(f"{kind} columns need Pillow, which is not installed", EXTRA) from None
    _import_all(PIL)
    Image.init()
    if kind == "video":
        from fedtune.core.data.video import import_pyav

        _import_all(import_pyav())


def _import_all(package: Any) -> None:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "Tk")):
            with suppress(Exception):  # what needs another library is not used
                importlib.import_module(module.name)


def answer(kind: Kind, body: bytes) -> bytes:
    """Decode one file. Return DECODED and the decoded numbers, or REJECTED and the reason:

    - an image: width and height, then its colours, red, green and blue, a byte each
    - a recording: its rate, then its samples, little-endian float32
    - a clip: its frames, each as an image"""
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
    """Decode an image: upright, in RGB. Errors: Rejected."""
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

    values = np.array(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise Rejected(UNREADABLE_IMAGE)
    low, high = float(values.min()), float(values.max())
    values -= low  # in place, since a child has little memory
    values *= 255 / max(high - low, 1e-9)
    return Image.fromarray(values.astype(np.uint8))


def decode_audio(body: bytes) -> tuple[Samples, int]:
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
    """Return how many frames are read of a recording with this header, before any is decoded: one
    more than it may have, whatever the header says. Errors: Rejected."""
    if not RATES[0] <= rate <= RATES[1] or not 0 < channels <= CHANNELS:
        raise Rejected(UNREADABLE_AUDIO)
    if frames > SECONDS * rate:
        raise Rejected(LONG_AUDIO)
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
