"""Read the image, audio and video files that records name, and keep what they show in a form that
is safe to read again.

A path is relative to the data file's folder and must lie inside it; no link is followed out of it,
and nothing outside is looked at (beneath.py).
A unit's files are decoded in a child process that can only compute and has limits of memory and
time (children.py, decoding.py). From the child's answer, which is not trusted, this process makes
the form that it keeps: a PNG of an image or of each frame, or a recording's samples. In this
process no library reads a record's file. A record whose file cannot be used is rejected for a
reason from a fixed list; neither the file's name nor its content is shown."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from fedtune.core import system_calls
from fedtune.core.data.children import ChildFailed, Children
from fedtune.core.data.files import Rejected
from fedtune.core.data.per_unit import per_unit
from fedtune.core.data.video import FRAMES
from fedtune.core.data.video import PIXELS as FRAME_PIXELS
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.core.files.beneath import Beneath, Outside

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("fedtune.data")
Kind = Literal["image", "audio", "video"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Samples = npt.NDArray[np.float32]

PROGRAM = "fedtune.core.data.media_process"
CPU_SECONDS = 60  # processor time for all files of a unit
WAITING = 600.0  # seconds that a child may live: it may wait in vain, or the machine may be busy
BYTES = 64 * 2**20  # most bytes of one file, and of the form in which it is kept
UNIT_BYTES = 2**30  # most bytes of a unit's files, and of all that they are decoded to
PIXELS = 40_000_000  # most pixels of one image
# The longer side by the shorter: an image processor that scales the shorter side to a fixed length
# would turn a line of pixels into an image of any size.
ASPECT = 20
SECONDS = 30.0  # longest recording
RATES = (4_000, 192_000)  # samples a second
CHANNELS = 16  # of one recording
EXTRA = "pip install 'fedtune[media]'"

DECODED, REJECTED = b"+", b"-"  # how a child's answer begins
SIZE = struct.Struct("<II")  # width and height of an image
LENGTH = struct.Struct("<I")  # length of a kept frame, or rate of a recording
MOST = {  # bytes of a child's answer
    "image": 3 * PIXELS + 64,
    "audio": int(4 * SECONDS * RATES[1]) + 64,
    "video": FRAMES * (3 * FRAME_PIXELS + 64),
}
LARGE_IMAGE, UNREADABLE_IMAGE = "image too large", "unreadable image"
LONG_AUDIO, UNREADABLE_AUDIO = "audio too long", "unreadable audio"
NO_DECODER = "no PCM WAV, and fedtune[media] is not installed"
UNDECODED = "cannot be decoded"  # the reason of each file of a unit whose child failed
REASONS = {
    "image": (LARGE_IMAGE, UNREADABLE_IMAGE),
    "audio": (LONG_AUDIO, UNREADABLE_AUDIO, NO_DECODER),
    "video": ("unreadable video", "video too large", "video too long"),
}


@dataclass(frozen=True, repr=False, eq=False)
class Media:
    """An image, a recording or a clip.

    - kind: "image", "audio" or "video"
    - body: the content, in the form that `keep` makes, which `picture`, `sound` and `clip` read
    - digest: the sha256 of `body`
    - file: the sha256 of the file that the record names; the ledger knows the record by it"""

    kind: Kind
    body: bytes
    digest: bytes
    file: bytes

    @classmethod
    def of(cls, kind: Kind, body: bytes, file: bytes | None = None) -> Media:
        """Return a Media with the content `body`, in the form that `keep` makes. file: the sha256
        of the file that a record names; None if there is no such file, since fedtune generated the
        content."""
        digest = hashlib.sha256(body).digest()
        return cls(kind, body, digest, digest if file is None else file)


class Folder:
    """The files under one folder."""

    def __init__(self, root: Path) -> None:
        self._files = Beneath(root)

    def open(self, name: str, kind: Kind) -> tuple[io.BufferedReader, str]:
        """Open the file `name`, a path relative to the folder. Return it, and its own path below
        the folder, which is the same however the name is spelt. Errors: Rejected if the path leads
        outside the folder, or the file is missing or cannot be opened. kind: "image", "audio" or
        "video", the word in the reason."""
        try:
            return self._files.open(name)
        except Outside:
            raise Rejected("media file outside the folder") from None
        except PermissionError:
            raise Rejected(f"unreadable {kind}") from None
        except OSError:
            raise Rejected("missing media file") from None

    def read(self, name: str, kind: Kind) -> bytes:
        """Return the content of the file `name`, a path relative to the folder. Errors: Rejected as
        for `open`, or if the file is empty, unreadable or too large. kind: "image", "audio" or
        "video", the word in the reason."""
        with self.open(name, kind)[0] as file:
            return _read_open(file, kind)


class UnitFiles:
    """The files that the records of one unit name. Each is read once, however its name is spelt.

    - folder: the folder below which they are
    - kind: "image", "audio" or "video"
    - most: how many bytes they may have together; a file that would exceed this is not read"""

    def __init__(self, folder: Folder, kind: Kind, most: int) -> None:
        self._folder, self._kind, self._left = folder, kind, most
        self._contents: dict[str, bytes | str] = {}  # own path of a file -> its content

    def read(self, name: str) -> bytes | str:
        """Return the content of the file `name`, or the reason (a str) why it cannot be used."""
        try:
            file, path = self._folder.open(name, self._kind)
        except Rejected as error:
            return error.reason
        with file:
            if path not in self._contents:
                self._contents[path] = self._read(file)
        return self._contents[path]

    def _read(self, file: io.BufferedReader) -> bytes | str:
        try:
            content = _read_open(file, self._kind, min(BYTES, self._left))
        except Rejected as error:
            return error.reason
        self._left -= len(content)
        return content


def read_file(path: Path, kind: Kind) -> bytes:
    """Return the content of the file at `path`. Errors: Rejected if it is empty, unreadable or
    larger than BYTES. kind: "image", "audio" or "video", the word in the reason."""
    try:
        file = reading.open_regular(path)
    except OSError:
        raise Rejected(f"unreadable {kind}") from None
    with file:
        return _read_open(file, kind)


def _read_open(file: io.BufferedReader, kind: Kind, most: int = BYTES) -> bytes:
    """Return the content of an open file. A file that is larger than `most` bytes is not read; of a
    file that grows meanwhile, at most one byte more than that is read. Errors: Rejected if the file
    is empty, unreadable or larger than `most` bytes."""
    try:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= most else b""
        if len(content) > size:  # it has grown, or the system does not know its length
            content += file.read(most + 1 - len(content))
    except OSError:
        raise Rejected(f"unreadable {kind}") from None
    if max(size, len(content)) > most:
        raise Rejected(f"{kind} too large")
    if not content:  # an empty input only asks a child whether it can start
        raise Rejected(f"unreadable {kind}")
    return content


class Decoder:
    """Decodes files of one kind, those of one unit at a time. It is used in a `with` block, in
    which child processes can be started.

    - kind: "image", "audio" or "video"
    - declared_size: the site's declared size if its whole dataset is read, else 0 (see Children)

    Except on Linux with an x86-64 or 64-bit ARM processor, the files are decoded in this process,
    without limits of time or memory, and a warning says so. Errors, before a file is decoded:
    ConfigError if what decodes them is not installed; InfrastructureError if Linux refuses to
    confine a child."""

    def __init__(self, kind: Kind, declared_size: int = 0) -> None:
        self._kind: Kind = kind
        self._children: Children | None = None
        if sys.platform == "linux" and system_calls.is_known():
            self._children = Children(
                PROGRAM,
                {"kind": kind},
                what=f"the decoding of {kind} files",
                otherwise="let containers install seccomp filters, as they do by default",
                cpu_seconds=CPU_SECONDS,
                seconds=WAITING,
                declared_size=declared_size,
            )

    def __enter__(self) -> Decoder:
        _import_what_reads_kept_forms(self._kind)
        if self._children is None:
            from fedtune.core.data.decoding import import_decoders

            log.warning(
                "this machine is not Linux on x86-64 or 64-bit ARM: %s files are decoded without a "
                "limit of time or memory, so that a hostile one can keep this process busy",
                self._kind,
            )
            import_decoders(self._kind)
        else:
            self._children.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._children is not None:
            self._children.__exit__(kind, error, traceback)

    def decode(self, files: Sequence[bytes]) -> list[Media | str]:
        """Decode the files of one unit. Return for each, in order, its decoded content as a Media,
        or the reason (a str) why the file cannot be used. If the child process fails, the reason is
        UNDECODED for all of them. files: the files' contents."""
        decoded = per_unit(self._decode, (Media, str))(files)
        return [UNDECODED] * len(files) if decoded is None else decoded

    def _decode(self, files: list[bytes]) -> list[Media | str]:
        left = UNIT_BYTES

        def take(told: bytes) -> bytes | str:
            nonlocal left
            left -= len(told)
            return keep(self._kind, told) if left >= 0 else f"{self._kind} too large"

        if self._children is None:
            from fedtune.core.data.decoding import answer

            kept = [take(answer(self._kind, content)) for content in files]
        else:
            try:
                kept = self._children.run(files, MOST[self._kind], take)
            except ChildFailed:
                return [UNDECODED] * len(files)
        return [
            body if isinstance(body, str) else Media.of(self._kind, body, _sha256(content))
            for body, content in zip(kept, files, strict=True)
        ]


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _import_what_reads_kept_forms(kind: Kind) -> None:
    """Import, before the first file is read, what this process needs to read the forms that `keep`
    makes. Which modules a process imports can be seen by its reads from disk, and so must not
    depend on a record. Errors: ConfigError if Pillow is needed and is not installed."""
    if kind == "audio":
        with suppress(ImportError):
            import scipy.signal  # type: ignore[import-untyped]  # noqa: F401
        return
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            f"{kind} columns need Pillow, which is not installed", todo=EXTRA
        ) from None
    Image.preinit()


def load(path: Path, kind: Kind) -> Media:
    """Read and decode the file at `path`. Errors: Rejected if the file cannot be used; ConfigError
    and InfrastructureError as for Decoder."""
    content = read_file(path, kind)
    with Decoder(kind) as decoder:
        (found,) = decoder.decode([content])
    if isinstance(found, str):
        raise Rejected(found)
    return found


# ------------------------------------------------------------------- the forms that are kept


def keep(kind: Kind, told: bytes) -> bytes | str:
    """Convert a child's answer (decoding.answer) to the form in which this process keeps a file's
    content. Return that form (bytes), or the reason (a str) why there is none. The answer, `told`,
    is not trusted: whatever its bytes are, the result is a form that `picture`, `clip` or `sound`
    can read, or one of a fixed list of reasons."""
    mark, content = told[:1], memoryview(told)[1:]
    try:
        if mark == REJECTED:
            return next(reason for reason in REASONS[kind] if reason.encode() == content)
        if mark != DECODED:
            return UNDECODED
        kept = _keep_sound(content) if kind == "audio" else _keep_images(kind, content)
        return kept if len(kept) <= BYTES else f"{kind} too large"
    except Rejected as rejected:
        return rejected.reason
    except (struct.error, ValueError, StopIteration):  # not in the form that `answer` gives
        return UNDECODED


def keep_frames(frames: Sequence[Image]) -> bytes:
    """Return the form in which images in RGB are kept: for a single image its PNG; for several
    frames each frame's PNG with its length in front."""
    files = [_png(frame) for frame in frames]
    if len(files) == 1:
        return files[0]
    return b"".join(LENGTH.pack(len(file)) + file for file in files)


def keep_samples(samples: Samples, rate: int) -> bytes:
    """Return the form in which a recording is kept: its rate, in samples per second, and its
    samples."""
    return LENGTH.pack(rate) + samples.astype("<f4").tobytes()


def _keep_images(kind: Kind, content: memoryview) -> bytes:
    from PIL import Image as pillow

    most, count = (PIXELS, 1) if kind == "image" else (FRAME_PIXELS, FRAMES)
    frames = []
    for _ in range(count):
        width, height = SIZE.unpack_from(content)
        end = SIZE.size + 3 * width * height
        if not 0 < width * height <= most or len(content) < end:
            raise Rejected(UNDECODED)
        if max(width, height) > ASPECT * min(width, height):
            raise Rejected(f"{kind} too narrow")
        frames.append(pillow.frombytes("RGB", (width, height), content[SIZE.size : end]))
        content = content[end:]
    if len(content):
        raise Rejected(UNDECODED)
    return keep_frames(frames)


def _keep_sound(content: memoryview) -> bytes:
    (rate,) = LENGTH.unpack_from(content)
    samples = np.frombuffer(content[LENGTH.size :], "<f4")
    if not RATES[0] <= rate <= RATES[1]:
        raise Rejected(UNREADABLE_AUDIO)
    if not len(samples) or not np.isfinite(samples).all():
        raise Rejected(UNREADABLE_AUDIO)
    if len(samples) > SECONDS * rate:
        raise Rejected(LONG_AUDIO)
    return keep_samples(samples, rate)


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def picture(media: Media) -> Image:
    """Return the image in `media`, of kind "image", in RGB."""
    return _read_png(media.body)


def clip(media: Media) -> list[Image]:
    """Return the frames of the clip in `media`, of kind "video", in order and in RGB: the few that
    were kept when the video was decoded (video.FRAMES)."""
    frames, rest = [], media.body
    while rest:
        (length,) = LENGTH.unpack_from(rest)
        frames.append(_read_png(rest[LENGTH.size : LENGTH.size + length]))
        rest = rest[LENGTH.size + length :]
    return frames


def _read_png(file: bytes) -> Image:
    from PIL import Image as pillow

    with pillow.open(io.BytesIO(file), formats=("PNG",)) as image:
        return image.convert("RGB")


def sound(media: Media, rate: int | None = None) -> Samples:
    """Return the samples of the recording in `media`, of kind "audio": (samples,) fp32 between -1
    and 1, in one channel. rate: the samples per second to which they are converted; None: the
    recording's own rate, as it is."""
    (own_rate,) = LENGTH.unpack_from(media.body)
    samples = np.frombuffer(media.body, "<f4", offset=LENGTH.size)
    if rate is None or rate == own_rate:
        return samples.astype(np.float32)
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, own_rate))
    return np.asarray(resample_poly(samples, rate // common, own_rate // common), dtype=np.float32)


def length(media: Media, rate: int) -> int:
    """Return how many samples `sound` gives of a recording at `rate` samples per second, without
    converting it."""
    (own_rate,) = LENGTH.unpack_from(media.body)
    samples = (len(media.body) - LENGTH.size) // 4
    return int(-(-samples * rate // own_rate))
