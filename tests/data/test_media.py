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


def tiff(tags: dict[int, tuple[int, int, bytes]], data: bytes, order: str = "<") -> bytes:
    """Lay out a TIFF file: tag -> (type, count, values). data: what stands at byte 8."""
    body, entries = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4) + data), b""
    for tag, (kind, count, values) in sorted(tags.items()):
        place = values.ljust(4, b"\0")
        if len(values) > 4:
            place = struct.pack(f"{order}I", len(body))
            body += values
        entries += struct.pack(f"{order}HHI", tag, kind, count) + place
    struct.pack_into(f"{order}I", body, 4, len(body))
    return bytes(body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


def grey(width: int, height: int, order: str = "<") -> dict[int, Any]:
    """Return the tags of a grey TIFF that is not compressed."""
    short, long = (lambda number, form=form: struct.pack(order + form, number) for form in "HI")
    plain = {256: (4, 1, long(width)), 257: (4, 1, long(height)), 258: (3, 1, short(8))}
    return plain | {259: (3, 1, short(1)), 262: (3, 1, short(1)), 277: (3, 1, short(1))}


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_many_pieces_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Pillow makes an object of each: a million took 5 s, and 64 MiB gigabytes."""
    places = struct.pack(f"{order}H", 8) * (media.PIECES + 1)
    for tag in (media.STRIPS, media.TILES):
        tags = grey(4, 4, order) | {tag: (3, media.PIECES + 1, places)}
        (tmp_path / f"{tag}.tiff").write_bytes(tiff(tags, bytes(16), order))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    names = [f"{tag}.tiff" for tag in (media.STRIPS, media.TILES)]
    assert read(tmp_path, names)[1] == {"image too large": 2}


def test_a_tiff_that_is_decoded_again_and_again_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By strips of one place, each of which Pillow decodes, or by tiles that are far larger than
    the image. Twin: as many as the image needs."""
    rows = (4, 1, struct.pack("<I", 32))
    for count in (2, 200):
        strips = (3, count, struct.pack("<H", 8) * count)
        tags = grey(64, 64) | {media.STRIPS: strips, 278: rows}
        (tmp_path / f"{count}.tiff").write_bytes(tiff(tags, bytes(64 * 32)))
    large = (4, 1, struct.pack("<I", 2**26))
    tiles = grey(40, 4) | {media.TILE_WIDTH: (4, 1, struct.pack("<I", 1)), media.TILE_LENGTH: large}
    tiles |= {media.TILES: (3, 40, struct.pack("<H", 8) * 40)}
    (tmp_path / "tiles.tiff").write_bytes(tiff(tiles, bytes(64)))
    monkeypatch.setattr(media, "COVERED", 4 * 64 * 64)
    assert len(read(tmp_path, ["2.tiff"])[0]) == 1
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert read(tmp_path, ["200.tiff", "tiles.tiff"])[1] == {"image too large": 2}


def test_an_image_with_a_part_many_times_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each EXIF segment of a JPEG Pillow copies all earlier ones; it inflates each colour
    profile of a PNG."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    body = (tmp_path / "a.jpg").read_bytes()
    part = b"\xff\xe1\0\x0aExif\0\0ab"
    for count in (media.MOST_REPEATED, media.MOST_REPEATED + 1):
        (tmp_path / f"{count}.jpg").write_bytes(body[:2] + part * count + body[2:])
    (tmp_path / "a.png").write_bytes(b"\x89PNG" + b"iCCP" * (media.MOST_REPEATED + 1))
    comment, chunk = b"\xff\xfe\0\2" * (media.SEGMENTS + 1), (bytes(4) + b"prVt" + bytes(4))
    (tmp_path / "b.jpg").write_bytes(body[:2] + comment + body[2:])
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk * (media.SEGMENTS + 1))
    tags = b"II*\0" + struct.pack("<IH", 8, media.TAGS + 1) + bytes(12 * (media.TAGS + 1))
    (tmp_path / "b.tiff").write_bytes(tags)
    assert len(read(tmp_path, [f"{media.MOST_REPEATED}.jpg"])[0]) == 1
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    names = [f"{media.MOST_REPEATED + 1}.jpg", "a.png", "b.jpg", "b.png", "b.tiff"]
    assert read(tmp_path, names)[1] == {"image too large": 5}


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


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_a_recording_is_judged_by_its_header_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """23 kB of 255 channels took 680 MB, and a rate of 2·10⁹ would have let an hour pass for 30 s.
    Nor is more decoded than a recording may have, whatever its header says."""
    asked = list[int]()
    if name == "a.wav":
        monkeypatch.setattr(
            wave.Wave_read, "readframes", lambda _, count: asked.append(count) or bytes(2)
        )
        for rate, channels in ((8000, 1), (8000, media.CHANNELS + 1), (2_000_000_000, 1)):
            with wave.open(str(tmp_path / f"{rate}-{channels}"), "wb") as file:
                file.setparams((channels, 2, rate, 0, "NONE", ""))
                file.writeframes(bytes(2 * channels))
    else:
        opened = pytest.importorskip("soundfile")
        form = name[2:].upper()
        for rate, channels in ((8000, 1), (8000, media.CHANNELS + 1), (400_000, 1)):
            usable = form if channels == 1 and (form, rate) != ("OGG", 400_000) else "AIFF"
            silence = np.zeros((8000, channels))
            opened.write(tmp_path / f"{rate}-{channels}", silence, rate, format=usable)
        plain = opened.SoundFile.read

        def noted(file: Any, most: int, **how: Any) -> Any:
            asked.append(most)
            return plain(file, most, **how)

        monkeypatch.setattr(opened.SoundFile, "read", noted)
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix == "")
    records, rejected = read(tmp_path, names, SAID)
    assert len(records) == 1 and rejected == {"unreadable audio": 2}
    assert asked == [int(media.SECONDS * 8000) + 1]


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
