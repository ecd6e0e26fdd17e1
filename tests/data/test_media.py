"""Image and audio columns: what is read, what is refused, and that nothing of it is shown."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fedtune.core.config import Columns, DataFile
from fedtune.core.data import media
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import read_records
from fedtune.core.errors import ConfigError
from tests.media import image, recording

ASK = Columns(image="image", prompt="q", completion="a")


def read(
    folder: Path, names: list[Any], columns: Columns = ASK
) -> tuple[list[Any], dict[str, int]]:
    column = columns.media
    assert column
    rows = [{column: name, "q": "what is it?", "a": "a cat", "label": 1} for name in names]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, rejected = read_records(DataFile(path=path, columns=columns))
    return records, dict(rejected)


def test_a_record_holds_its_file(tmp_path: Path) -> None:
    image(tmp_path / "images" / "a.png", 0, (20, 30))
    (record,), rejected = read(tmp_path, ["images/a.png"])
    assert not rejected
    assert media.picture(record.media).size == (30, 20)
    assert record.media.body == (tmp_path / "images" / "a.png").read_bytes()
    assert "cat" not in repr(record) and "a.png" not in repr(record)


def test_a_file_is_read_once_however_many_records_name_it(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 0)
    records, _ = read(tmp_path, ["a.png", "./a.png", "a.png"])
    assert len({id(record.media) for record in records}) == 1


def test_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "site"
    image(tmp_path / "secret.png", 0)
    image(inside / "own.png", 1)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "fine.png").symlink_to(inside / "own.png")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "up/secret.png"]
    records, rejected = read(inside, [*outside, "loop.png", "none.png", "fine.png", "x" * 5000])
    assert len(records) == 1
    assert rejected == {"media file outside the folder": 4, "missing media file": 3}


def test_an_absolute_path_is_refused_even_inside(tmp_path: Path) -> None:
    image(tmp_path / "a.png", 0)
    assert read(tmp_path, [str(tmp_path / "a.png")])[1] == {"media file outside the folder": 1}


def test_broken_files_are_counted_by_reason(tmp_path: Path) -> None:
    image(tmp_path / "good.png", 0)
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("Mrs Adler's scan")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "anim.gif").write_bytes(b"GIF89a" + bytes(40))  # a format that is not on the list
    names = ["good.png", "cut.png", "text.png", "empty.png", "anim.gif", None, 7, " "]
    records, rejected = read(tmp_path, names)
    assert len(records) == 1
    assert rejected == {"unreadable image": 4, "missing value": 1, "wrong type": 1, "empty text": 1}


def test_a_small_file_of_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (7000, 7000)).save(tmp_path / "bomb.png")
    Image.init()  # the plug-ins of some formats load an image of their own
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert read(tmp_path, ["bomb.png"])[1] == {"image too large": 1}


def test_a_jpeg_of_many_scans_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 bytes a scan went over 40 million pixels in 3 ms: a file of 64 MiB took an hour. Some that
    a thumbnail has, or what follows the end, are no hindrance; behind a marker without a length,
    which a reader of segments takes for one with a length, they count too."""
    image(tmp_path / "a.png", 0, (64, 64))
    thumbnail = b"Exif\0\0" + b"\xff\xda\0\2" * 20
    with Image.open(tmp_path / "a.png") as whole:
        whole.convert("RGB").save(tmp_path / "plain.jpg", progressive=True, exif=thumbnail)
    body = (tmp_path / "plain.jpg").read_bytes()
    last = body.rindex(b"\xff\xda")
    for name, scans in (("few.jpg", 50), ("many.jpg", media.SCANS)):
        (tmp_path / name).write_bytes(body[:last] + body[last:-2] * scans + body[-2:])
    (tmp_path / "moving.jpg").write_bytes(body + b"\xff\xda\0\2" * 50)
    hidden = b"\xff\x02\xff\xff" + body[last:-2] * media.SCANS
    (tmp_path / "hidden.jpg").write_bytes(body[:last] + hidden + body[last:])
    records, rejected = read(tmp_path, ["plain.jpg", "few.jpg", "moving.jpg"])
    assert len(records) == 3 and not rejected
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert read(tmp_path, ["many.jpg", "hidden.jpg"])[1] == {"image too large": 2}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_a_picture_is_turned_without_writing_its_tags_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """As Pillow itself turns it; but to write its tags again took 17 s for 16 MB of them."""
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:2, :3] = 200
    exif = Image.Exif()
    for value in range(1, 9):
        exif[media.ORIENTATION] = value
        name = f"{value}.{suffix}"
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        with monkeypatch.context() as patched:
            patched.setattr(ImageFileDirectory_v2, "tobytes", lambda *_: pytest.fail("written"))
            (record,), _ = read(tmp_path, [name])
            assert np.array_equal(np.asarray(media.picture(record.media)), np.asarray(expected))


def test_an_image_that_a_processor_would_blow_up_is_rejected(tmp_path: Path) -> None:
    """A short edge of one pixel made 16 makes of 39 million pixels ten thousand million."""
    for size in ((1, 21), (30_000, 1), (1, 39_000), (20, 1), (3, 60)):
        Image.new("RGB", size).save(tmp_path / f"{size[0]}x{size[1]}.png")
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    records, rejected = read(tmp_path, names)
    assert len(records) == 2 and rejected == {"image too narrow": 3}


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "BYTES", 100)
    image(tmp_path / "a.png", 0)
    assert read(tmp_path, ["a.png"])[1] == {"image too large": 1}


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.linspace(1000, 3000, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "ray.png")
    (record,), _ = read(tmp_path, ["ray.png"])
    grey = np.asarray(media.picture(record.media))[..., 0]
    assert (grey.min(), grey.max()) == (0, 255) and (np.diff(grey.ravel().astype(int)) >= 0).all()


SAID = Columns(audio="audio", label="label")


def test_a_label_may_stand_beside_a_file_alone(tmp_path: Path) -> None:
    recording(tmp_path / "a.wav", 0)
    (record,), _ = read(tmp_path, ["a.wav"], SAID)
    assert (record.prompt, record.label) == ("", "1")
    assert len(media.decode_sound(record.media)) == 2400
    assert len(media.decode_sound(record.media, 16_000)) == 4800


def test_long_and_broken_recordings_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording(tmp_path / "long.wav", 0, seconds=31)
    recording(tmp_path / "none.wav", 0, seconds=0)
    recording(tmp_path / "fine.wav", 0)
    body = bytearray((tmp_path / "fine.wav").read_bytes())
    (tmp_path / "cut.wav").write_bytes(body[:30])
    body[24:28] = struct.pack("<I", 10)  # ten samples a second
    (tmp_path / "slow.wav").write_bytes(body)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    names = ["long.wav", "none.wav", "cut.wav", "slow.wav", "fine.wav"]
    records, rejected = read(tmp_path, names, SAID)
    assert len(records) == 1
    assert rejected["audio too long"] >= 1
    assert sum(rejected.values()) == 4
    assert set(rejected) <= {
        "audio too long",
        "unreadable audio",
        "no PCM WAV, and fedtune[media] is not installed",
    }


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_pcm_is_the_same_sound(width: int) -> None:
    tone = np.sin(np.arange(400) / 9)
    wide = np.round(tone * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (wide + (128 if width == 1 else 0)).astype("<i8").tobytes()
    body = b"".join(raw[at : at + width] for at in range(0, len(raw), 8))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(width)
        out.setframerate(8000)
        out.writeframes(body)
    found = media.decode_sound(media.Media("audio", file.getvalue(), b""))
    assert np.abs(found - tone).max() < 2.5 / 2 ** (8 * width - 1) + 1e-6


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png", 0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"Pillow.*not installed.*fedtune\[media\]"):
        read(tmp_path, ["a.png"])


def test_links_are_followed_before_the_path_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a reader that looks at the written path alone reads another folder's file."""
    inside = tmp_path / "site"
    image(tmp_path / "secret.png", 0)
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(Rejected, match="outside"):
        media.Folder(inside).read("link.png", "image")
    monkeypatch.setattr(media.Folder, "_inside", lambda self, name: self._root / name)
    assert media.Folder(inside).read("link.png", "image").body


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image": "i", "audio": "a", "label": "l"}, "one of image, audio or video"),
        ({"image": "i"}, "exactly one"),
        ({"label": "l"}, "exactly one"),
    ],
)
def test_columns_that_make_no_record(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Columns(**given)


@pytest.mark.parametrize(("kind", "usual"), [("image", "PNG"), ("audio", "WAV")])
def test_no_record_decides_which_modules_are_imported(
    tmp_path: Path, kind: str, usual: str
) -> None:
    """Whoever shares the machine sees which files of a library are read from disk. Twin: reading
    one such file by itself imports more."""
    looks = f"""if True:
        import json, pathlib, sys
        import numpy, PIL.Image
        from fedtune.core.config import Columns, DataFile
        from fedtune.core.data import media, records
        if sys.argv[1] == "alone":
            media.import_decoders = records.import_decoders = lambda kind: None
        folder = pathlib.Path({str(tmp_path)!r})
        def read(*names):
            rows = [dict(f=name, label="x") for name in names]
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + chr(10) for row in rows))
            columns = Columns({kind}="f", label="label")
            found, failed = records.read_records(DataFile(path=path, columns=columns))
            assert len(found) == len(names), failed
        read("usual")
        before = {{*sys.modules}}
        read("usual", *sys.argv[2:])
        print(*{{*sys.modules}} - before)"""
    if kind == "image":
        Image.new("RGB", (8, 8)).save(tmp_path / "usual", usual)
        others = ["TIFF", "WEBP", "JPEG", "BMP"]
        for name in others:
            Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name, name)
    else:
        soundfile = pytest.importorskip("soundfile")
        others = ["FLAC"]
        for name, form in (("usual", usual), ("FLAC", "FLAC")):
            soundfile.write(tmp_path / name, np.zeros(8000), 8000, format=form)

    def imported(how: str) -> str:
        words = [sys.executable, "-c", looks, how, *others]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert imported("first") == ""
    assert imported("alone") != ""
