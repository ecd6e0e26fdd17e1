"""Image and audio columns: what is read, what is refused, and that nothing of it is shown."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import wave
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from fedtune.core import system_calls
from fedtune.core.config import Columns, DataFile, Site, SiteData
from fedtune.core.data import children, decoding, media
from fedtune.core.data.files import Rejected
from fedtune.core.data.identity import identities
from fedtune.core.data.records import read_file, read_records
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.core.files.beneath import Beneath
from tests.media import image, recording

ASK = Columns(image="image", prompt="q", completion="a")
pytestmark = pytest.mark.usefixtures("started_once")


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, media.Decoder]]:
    with media.Decoder("image") as images, media.Decoder("audio") as recordings:
        yield {"image": images, "audio": recordings}


@pytest.fixture
def started_once(running: dict[str, media.Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that forks serves all readings of this file, as starting it takes a second."""
    monkeypatch.setattr(
        "fedtune.core.data.records.Decoder", lambda kind, _: nullcontext(running[kind])
    )


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
    with Image.open(tmp_path / "images" / "a.png") as shown:
        assert media.picture(record.media).tobytes() == shown.tobytes()
    content = (tmp_path / "images" / "a.png").read_bytes()
    assert record.media.file == hashlib.sha256(content).digest()
    assert "cat" not in repr(record) and "a.png" not in repr(record)


def test_the_ledger_knows_a_file_by_its_own_bytes(tmp_path: Path) -> None:
    """As every release did, whatever form it keeps. (load_dataset: tests/models/test_media.py.)"""
    image(tmp_path / "a.png", 0)
    of_patients(tmp_path, [("a", "a.png")])
    columns = Columns(image="image", label="label", patient="who")
    (known,) = identities(SiteData(path=tmp_path / "data.jsonl", columns=columns))
    assert b"media\0" + hashlib.sha256((tmp_path / "a.png").read_bytes()).digest() in known


def test_a_file_whose_child_fails_is_known_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine, say: else data that is declared public would be compared without it."""
    image(tmp_path / "a.png", 0)
    of_patients(tmp_path, [("a", "a.png"), ("b", "a.png"), ("b", "none.png")])
    columns = Columns(image="image", label="label", patient="who")
    data = SiteData(path=tmp_path / "data.jsonl", columns=columns)
    member = b"media\0" + hashlib.sha256((tmp_path / "a.png").read_bytes()).digest()
    assert [member in record for record in identities(data)] == [True, True]

    def fail(*_: object) -> None:
        raise children.ChildFailed

    monkeypatch.setattr(children.Children, "run", fail)
    assert identities(data) == [{member}]


def test_a_patients_file_is_read_once_however_many_records_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two patients one body is kept, though each one's file is decoded for itself."""
    image(tmp_path / "a.png", 0)
    (tmp_path / "here").symlink_to(".")
    opened = list[str]()
    plain = media._read_open
    monkeypatch.setattr(
        media, "_read_open", lambda file, *given: opened.append(file) or plain(file, *given)
    )
    spelt = ["a.png", "a.png", "./a.png", ".//a.png/", "here/a.png", "here/here/a.png"]
    found = of_patients(tmp_path, [*(("a", name) for name in spelt), ("b", "a.png")]).records
    assert len(found) == 7 and len(opened) == 2
    assert len({id(record.media.body) for record in found}) == 1


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_a_picture_is_turned_without_writing_its_tags_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """As Pillow itself turns it; but to write its tags again took 17 s for 16 MB of them."""
    pixels = np.zeros((6, 9, 3), np.uint8)
    pixels[:2, :3] = 200
    exif = Image.Exif()
    for value in range(1, 9):
        exif[decoding.ORIENTATION] = value
        name = f"{value}.{suffix}"
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        with monkeypatch.context() as patched:
            patched.setattr(ImageFileDirectory_v2, "tobytes", lambda *_: pytest.fail("written"))
            turned = decoding.decode_image((tmp_path / name).read_bytes())
            assert np.array_equal(np.asarray(turned), np.asarray(expected))


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
    assert len(media.sound(record.media)) == 2400
    assert len(media.sound(record.media, 16_000)) == 4800


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
    names = ["long.wav", "none.wav", "cut.wav", "slow.wav", "fine.wav"]
    records, rejected = read(tmp_path, names, SAID)
    assert len(records) == 1
    assert rejected["audio too long"] >= 1
    assert sum(rejected.values()) == 4
    assert set(rejected) <= set(media.REASONS["audio"])
    monkeypatch.setitem(sys.modules, "soundfile", None)
    body = (tmp_path / "cut.wav").read_bytes()
    assert decoding.answer("audio", body) == media.REJECTED + media.NO_DECODER.encode()


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
    found, _ = decoding.decode_audio(file.getvalue())
    assert np.abs(found - tone).max() < 2.5 / 2 ** (8 * width - 1) + 1e-6


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a.png", 0)
    monkeypatch.undo()
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
    monkeypatch.setattr(
        Beneath, "open", lambda self, name: (reading.open_regular(inside / name), name)
    )
    assert media.Folder(inside).read("link.png", "image")


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


# --------------------------------------------------------------------- in a process of its own


def jpeg_of_scans(folder: Path, count: int) -> bytes:
    """A JPEG whose last scan, of a few bytes, comes this many times: each goes over all pixels."""
    Image.new("RGB", (3000, 3000), (90, 120, 9)).save(folder / "scans.jpg", progressive=True)
    body = (folder / "scans.jpg").read_bytes()
    last = body.rindex(b"\xff\xda")
    return body[:last] + body[last:-2] * count + body[-2:]


def of_patients(folder: Path, rows: list[tuple[str, str]], **site: int) -> Any:
    """Read a site's file of rows (patient, name of an image)."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"who": w, "image": n, "label": 1}) + "\n" for w, n in rows))
    columns = {"image": "image", "label": "label", "patient": "who"}
    given = {"name": "a", "declared_size": 4, "state": str(folder), **site}
    found = Site.model_validate(
        {"site": given, "data": {"path": str(path), "columns": columns}}, strict=False
    )
    return read_file(found.data, unit="patient", strict=False)


def test_a_hostile_file_costs_its_own_patient_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG of so many scans takes minutes; a file of 64 MiB took hours. Twin: with fewer scans
    the same image is read."""
    monkeypatch.undo()
    monkeypatch.setattr(media, "CPU_SECONDS", 2)
    (tmp_path / "hours.jpg").write_bytes(jpeg_of_scans(tmp_path, 3000))
    (tmp_path / "fine.jpg").write_bytes(jpeg_of_scans(tmp_path, 2))
    image(tmp_path / "own.png", 0)
    rows = [("z", "own.png"), ("a", "own.png"), ("z", "hours.jpg"), ("b", "fine.jpg")]
    found = of_patients(tmp_path, rows)
    assert [(record.unit, record.place.row) for record in found.records] == [("a", 2), ("b", 4)]
    failed = [(row.row, row.reason) for row in found.failed]
    assert failed == [(1, media.UNDECODED), (3, media.UNDECODED)]


def test_a_file_takes_no_more_memory_than_a_child_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small file. Twin: with the limit that children have, it is an image."""
    Image.new("1", (6000, 6000)).save(tmp_path / "large.png")
    records, rejected = read(tmp_path, ["large.png"])
    assert len(records) == 1 and not rejected
    monkeypatch.undo()
    monkeypatch.setattr(children, "MEMORY", 2**26)
    records, rejected = read(tmp_path, ["large.png"])
    assert not records and rejected in ({"image too large": 1}, {media.UNDECODED: 1})


def test_no_library_reads_a_file_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: on a machine that cannot confine a child, this process decodes, and says so."""
    image(tmp_path / "a.png", 0)
    asked = list[str]()
    plain = decoding.answer
    for machines, here in ((system_calls.MACHINES, []), ({}, ["image"])):
        monkeypatch.undo()
        monkeypatch.setattr(system_calls, "MACHINES", machines)
        monkeypatch.setattr(
            decoding, "answer", lambda kind, body: asked.append(kind) or plain(kind, body)
        )
        ((record,), _) = read(tmp_path, ["a.png"])
        assert asked == here
        assert media.picture(record.media).size == (20, 20)


def test_a_machine_without_a_filter_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image(tmp_path / "a.png", 0)
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert len(read(tmp_path, ["a.png"])[0]) == 1
    assert "decoded without a limit of time or memory" in caplog.text


@pytest.mark.parametrize("patients", [0, 1, 4])
def test_how_many_children_decode_is_a_public_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patients: int
) -> None:
    """A child more is forked at the start. Twin: without making up there are as many as units."""
    monkeypatch.undo()
    image(tmp_path / "a.png", 0)
    rows = [(f"{number}", "a.png") for number in range(patients)] * 2
    told = list[object]()
    send = socket.send_fds
    monkeypatch.setattr(
        children.socket, "send_fds", lambda *given: told.append(given) or send(*given)
    )
    of_patients(tmp_path, rows)
    assert len(told) == 1 + 5
    told.clear()
    monkeypatch.setattr(children.Children, "_run_idle_children", lambda self: None)
    of_patients(tmp_path, rows)
    assert len(told) == 1 + patients


def test_what_a_patient_has_no_bytes_left_for_is_not_read(tmp_path: Path) -> None:
    """However often other names lead to it. Linux counts the bytes that this process reads."""

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    large = tmp_path / "large.png"
    large.touch()
    os.truncate(large, 8 * 2**20)
    for number in range(20):
        (tmp_path / f"{number}.png").hardlink_to(large)
    before = bytes_read()
    files = media.UnitFiles(media.Folder(tmp_path), "image", 8 * 2**20)
    found = [files.read(f"{number}.png") for number in range(20)]
    assert [len(content) for content in found[:1]] == [8 * 2**20]
    assert found[1:] == ["image too large"] * 19
    assert bytes_read() - before < 9 * 2**20


def test_a_patients_files_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are read, and as they are decoded; another patient's are not counted."""
    names = [image(tmp_path / f"{number}.png", number) for number in range(3)]
    size = sum((tmp_path / name).stat().st_size for name in names)
    rows = [("a", names[0]), ("a", names[1]), ("b", names[0]), ("a", names[2]), ("a", names[0])]
    monkeypatch.setattr("fedtune.core.data.records.UNIT_BYTES", size - 1)
    found = of_patients(tmp_path, rows)
    assert [(row.row, row.reason) for row in found.failed] == [(4, "image too large")]
    assert len(found.records) == 4
    monkeypatch.setattr("fedtune.core.data.records.UNIT_BYTES", size)
    monkeypatch.setattr(media, "UNIT_BYTES", 2 * (3 * 20 * 20 + 9))
    found = of_patients(tmp_path, rows)
    assert [(row.row, row.reason) for row in found.failed] == [(4, "image too large")]


HOSTILE_ANSWERS = {
    "image": [
        *(b"", b"?", b"+", b"-", b"-image of Mrs Adler", b"+" + bytes(8), b"+" + b"\xff" * 8),
        b"+" + struct.pack("<II", 2, 2) + bytes(11),
        b"+" + struct.pack("<II", 2, 2) + bytes(13),
        b"+" + struct.pack("<II", 0, 2**31),
        b"+" + struct.pack("<II", 30_000, 30_000),
    ],
    "audio": [
        *(b"", b"+", b"+\x40\x1f\0\0", b"+\x40\x1f\0\0abc", b"-image too large"),
        b"+" + struct.pack("<If", 8000, float("nan")),
        b"+" + struct.pack("<If", 1, 0.5),
        b"+" + struct.pack("<I", 4000) + bytes(4 * 120_001),
    ],
    "video": [
        *(b"", b"+", b"+" + struct.pack("<II", 1, 1) + bytes(3)),
        b"+" + (struct.pack("<II", 1, 1) + bytes(3)) * 9,
        b"+" + struct.pack("<II", 2**12, 2**11) + bytes(9),
    ],
}


@pytest.mark.parametrize("kind", media.KINDS)
def test_what_a_child_answers_is_not_trusted(kind: media.Kind) -> None:
    """A child that a hostile file has taken over answers anything. Twin: what is in order is
    kept."""
    reasons = {*media.REASONS[kind], media.UNDECODED, f"{kind} too large", f"{kind} too narrow"}
    draw = np.random.default_rng(0)
    noise = [b"+" + draw.bytes(int(draw.integers(60))) for _ in range(500)]
    for told in [*HOSTILE_ANSWERS[kind], *noise]:
        assert media.keep(kind, told) in reasons
    size = struct.pack("<II", 1, 2) + bytes(6)
    fine = {"image": size, "audio": struct.pack("<If", 8000, 0.5), "video": size * 8}
    kept = media.keep(kind, b"+" + fine[kind])
    assert isinstance(kept, bytes)
    found = media.Media.of(kind, kept)
    if kind == "audio":
        assert media.sound(found).tolist() == [0.5]
    else:
        shown = media.clip(found) if kind == "video" else [media.picture(found)]
        assert [frame.size for frame in shown] == [(1, 2)] * (8 if kind == "video" else 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_nothing_is_lost_on_the_way(tmp_path: Path, form: str) -> None:
    """An image is what Pillow decodes, to the last bit."""
    noise = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a", form)
    (record,), _ = read(tmp_path, ["a"])
    with Image.open(tmp_path / "a") as expected:
        assert media.picture(record.media).tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None)])
def test_no_sample_is_lost_on_the_way(tmp_path: Path, form: str, subtype: str | None) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = 0.1 * np.random.default_rng(1).standard_normal(900)
    soundfile.write(tmp_path / "a", samples, 8000, format=form, subtype=subtype)
    (record,), _ = read(tmp_path, ["a"], SAID)
    expected, _ = soundfile.read(tmp_path / "a", dtype="float32")
    assert np.array_equal(media.sound(record.media), expected)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_no_record_decides_which_modules_are_imported(tmp_path: Path, kind: str) -> None:
    """Whoever shares the machine sees which files of a library are read from disk. Twin: what reads
    the kept forms is imported with the first record."""
    looks = f"""if True:
        import json, pathlib, sys
        from fedtune.core.config import Columns, DataFile
        from fedtune.core.data import media, records
        if sys.argv[1] == "late":
            media._import_what_reads_kept_forms = lambda kind: None
        folder = pathlib.Path({str(tmp_path)!r})
        def read(*names):
            rows = [dict(f=name, label="x") for name in names]
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + chr(10) for row in rows))
            file = DataFile(path=path, columns=Columns({kind}="f", label="label"))
            found = records.read_file(file, strict=False).records
            assert len(found) == len(names)
            for record in found:
                if {kind!r} == "audio":
                    media.sound(record.media, 16_000)
                else:
                    media.picture(record.media)
        read()
        before = {{*sys.modules}}
        read(*sys.argv[2:])
        print(*{{*sys.modules}} - before)"""
    if kind == "image":
        names = ["PNG", "TIFF", "WEBP", "JPEG", "BMP"]
        for name in names:
            Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / name, name)
    else:
        names = [recording(tmp_path / "a.wav", 0)]

    def imported(how: str) -> str:
        words = [sys.executable, "-c", looks, how, *names]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert imported("first") == ""
    assert imported("late") != ""
