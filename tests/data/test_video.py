"""Video columns: which frames are read, what is refused, and that order in time is learned."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core import modalities
from fedtune.core.bases import architecture
from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Columns, DataFile
from fedtune.core.data import media, video
from fedtune.core.data.files import Rejected
from fedtune.core.data.load import load_dataset
from fedtune.core.data.records import read_records
from fedtune.core.errors import ConfigError, DataError, ModelError
from fedtune.core.models import network as network_module
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from tests.dp.conftest import study
from tests.media import WITHOUT_AV, clip, film, image, llava, qwen2_vl, recording

av = pytest.importorskip("av", reason=WITHOUT_AV)

SHOWN = Columns(video="video", label="label")
FORMATS = {"mp4": "mpeg4", "mov": "mjpeg", "mkv": "mpeg4", "webm": "libvpx", "avi": "mjpeg"}


def greys(levels: Sequence[float]) -> np.ndarray:
    """A frame of each level."""
    return np.stack([np.full((32, 48, 3), level, np.uint8) for level in levels])


def levels_of(path: Path) -> list[float]:
    """The mean level of each frame that is read."""
    found = media.clip(media.load(path, "video"))
    return [float(np.asarray(frame).mean()) for frame in found]


def read(folder: Path, names: list[Any]) -> tuple[list[Any], dict[str, int]]:
    rows = [{"video": name, "label": "yn"[number % 2]} for number, name in enumerate(names)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, rejected = read_records(DataFile(path=path, columns=SHOWN))
    return records, dict(rejected)


# ----------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(("suffix", "codec"), FORMATS.items())
def test_frames_are_evenly_spaced(tmp_path: Path, suffix: str, codec: str) -> None:
    clip(tmp_path / f"a.{suffix}", greys(range(0, 250, 10)), codec)  # 25 frames
    expected = [10 * (24 * (2 * part + 1) // 16) for part in range(video.FRAMES)]
    assert levels_of(tmp_path / f"a.{suffix}") == pytest.approx(expected, abs=4.9)


def test_a_clip_in_fragments_with_plain_sound_is_read(tmp_path: Path) -> None:
    """Bounds that had to tell such files from hostile ones refused them."""
    path = tmp_path / "a.mov"
    with av.open(path, "w", options={"movflags": "frag_keyframe+empty_moov"}) as out:
        shown = out.add_stream("mjpeg", rate=8)
        shown.width, shown.height, shown.pix_fmt = 48, 32, "yuvj420p"
        heard = out.add_stream("pcm_s16le", rate=8000)
        for level in range(0, 240, 10):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, np.uint8))
            out.mux(shown.encode(frame))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.int16), layout="mono")
            silence.sample_rate = 8000
            out.mux(heard.encode(silence))
        out.mux(shown.encode())
        out.mux(heard.encode())
    assert b"moof" in path.read_bytes()
    found = levels_of(path)
    assert len(found) == video.FRAMES and found == sorted(found) and found[-1] > 200


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 300])
def test_every_clip_has_as_many_frames(tmp_path: Path, count: int) -> None:
    clip(tmp_path / "a.avi", greys(np.linspace(0, 240, count)))
    found = levels_of(tmp_path / "a.avi")
    assert len(found) == video.FRAMES and found == sorted(found)


def test_a_frame_that_is_shown_for_long_is_read_several_times(tmp_path: Path) -> None:
    """Of a clip of any frame rate, what counts is when a frame is shown."""
    times = [0, 1, 2, 3, 4, 5, 6, 7, 80]
    clip(tmp_path / "a.mkv", greys([20 * n for n in range(9)]), "mpeg4", times)
    assert levels_of(tmp_path / "a.mkv") == pytest.approx([100] + [140] * 7, abs=4)


def test_a_clip_that_was_held_upright_is_read_upright(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4", greys([90] * 9), "mpeg4")
    body = (tmp_path / "a.mp4").read_bytes()
    straight = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    turned = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
    at = body.index(straight, body.index(b"tkhd"))
    rotated = body[:at] + turned + body[at + len(turned) :]
    assert video.decode_frames(body)[0].size == (48, 32)
    assert video.decode_frames(rotated)[0].size == (32, 48)


def test_a_clip_is_decoded_in_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: PyAV's own settings start threads."""
    path = tmp_path / "a.mp4"
    clip(path, np.zeros((30, 64, 64, 3)), "libx264")
    counts: list[int] = []

    def counted(items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            counts.append(len(os.listdir("/proc/self/task")))
            yield item

    before, first = len(os.listdir("/proc/self/task")), video._first
    monkeypatch.setattr(video, "_first", lambda items: counted(first(items)))
    video.decode_frames(path.read_bytes())
    assert counts and max(counts) == before
    with av.open(path) as container:
        container.streams.video[0].thread_count = 2
        list(counted(container.decode(video=0)))
    assert max(counts) > before


# ---------------------------------------------------------------------------------- hostile files


def hostile(folder: Path) -> dict[str, str]:
    """Files that are no clips, with the reason of each."""
    film(folder / "fine.avi", 0)
    whole = (folder / "fine.avi").read_bytes()
    clip(folder / "fine.mp4", greys([1] * 9), "mpeg4")
    moving = (folder / "fine.mp4").read_bytes()
    files = {
        "empty.mp4": b"",
        "text.mp4": b"Mrs Adler's scan",
        "header.avi": whole[:200],
        "cut.mp4": moving[: len(moving) // 2],
        "noise.webm": b"\x1a\x45\xdf\xa3" + bytes(range(256)) * 9,
        "list.mp4": b"ffconcat version 1.0\nfile 'fine.mp4'\n",
        "stream.mp4": b"#EXTM3U\n#EXTINF:9,\nfine.mp4\n#EXT-X-ENDLIST\n",
    }
    for name, body in files.items():
        (folder / name).write_bytes(body)
    image(folder / "image.png", 0)
    recording(folder / "sound.wav", 0)
    with av.open(folder / "sound.mkv", "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        silence.sample_rate = 8000
        out.mux(stream.encode(silence))
    with av.open(folder / "none.mkv", "w") as out:  # a stream without a frame
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        out.start_encoding()
    clip(folder / "other.mkv", greys([1] * 9), "ffv1")
    clip(folder / "wide.avi", np.zeros((2, 8, 400, 3)))
    at = moving.index(b"stsz") + 12
    many = moving[: at - 4] + struct.pack(">II", 1, 80_000_000) + moving[at + 4 :]
    (folder / "many.mp4").write_bytes(many)
    others = ["image.png", "sound.wav", "sound.mkv", "none.mkv", "other.mkv", "many.mp4"]
    reasons = dict.fromkeys([*files, *others], "unreadable video")
    return reasons | {"wide.avi": "video too narrow"}


def test_a_hostile_file_is_its_own_records_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reasons = hostile(tmp_path)
    records, rejected = read(tmp_path, ["fine.avi", *reasons, "fine.mp4"])
    assert [record.place.row for record in records] == [1, len(reasons) + 2]
    expected = {reason: [*reasons.values()].count(reason) for reason in set(reasons.values())}
    assert rejected == expected
    assert capfd.readouterr() == ("", "") and not caplog.text


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("PIXELS", 32 * 24 - 1, "video too large"),
        ("DECODED", 12 * 32 * 24 - 1, "video too long"),
        ("PACKETS", 11, "video too long"),
    ],
)
def test_what_is_decoded_of_a_clip_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, reason: str
) -> None:
    film(tmp_path / "a.avi", 0, frames=12)
    body = (tmp_path / "a.avi").read_bytes()
    monkeypatch.setattr(video, limit, value + 1)
    assert len(video.decode_frames(body)) == video.FRAMES
    monkeypatch.setattr(video, limit, value)
    with pytest.raises(Rejected, match=reason):
        video.decode_frames(body)


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "BYTES", 100)
    film(tmp_path / "a.avi", 0)
    assert read(tmp_path, ["a.avi"])[1] == {"video too large": 1}


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "a.avi", 0)
    (tmp_path / "without" / "av.py").parent.mkdir()
    (tmp_path / "without" / "av.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path / "without")  # of the process that decodes too
    with pytest.raises(ConfigError, match=r"PyAV.*not installed.*fedtune\[video\]"):
        read(tmp_path, ["a.avi"])


# ------------------------------------------------------------------------------------ what a base
# makes of it


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava(tmp_path_factory.mktemp("base") / "llava")


def plan_of(base: Path, **more: Any) -> Any:
    objective = {"name": "classify", "labels": ["left", "right"], "max_length": 200}
    named = {"model": str(base), "modality": "video_text"}
    return study(base=named, objective=objective, lora=None, **more)


def vectors_of(base: Path, folder: Path, names: list[str], labels: list[str]) -> np.ndarray:
    """The vector of each record that can be read, as a head alone reads it."""
    rows = [{"video": n, "label": label} for n, label in zip(names, labels, strict=True)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = plan_of(base)
    network = Network(find_base(str(base)), torch.float32, None, 2, modality="video_text")
    file = DataFile(path=path, columns=SHOWN)
    dataset = load_dataset(file, plan, network.tokenizer, reader=network.reader)
    cached = CachedDataset(network, dataset)
    found = []
    for batch in cached.batches(range(len(dataset.examples))):
        found += [*zip(batch.index, network.pool(batch.prefix, batch.mask).numpy(), strict=True)]
    return np.stack([vector for _, vector in sorted(found, key=lambda each: each[0])])


def moving(folder: Path, count: int, still: bool = False) -> tuple[list[str], list[str]]:
    """Clips of a bright square that goes left or right over the same places; still: the middle
    frame alone, for as long."""
    draw = np.random.default_rng(7)
    names, labels = [], []
    for number in range(count):
        frames = np.zeros((16, 48, 48, 3), np.uint8)
        middle, height = draw.uniform(16, 32), int(draw.uniform(8, 28))
        for at, frame in enumerate(frames):
            left = int(middle + (at - 7.5) * (1 if number % 2 else -1)) - 6
            frame[height : height + 12, max(left, 0) : left + 12] = 255
        shown = np.repeat(frames[8:9], 16, axis=0) if still else frames
        names.append(clip(folder / f"{'still' if still else 'moving'}-{number}.avi", shown))
        labels.append(["left", "right"][number % 2])
    return names, labels


def told_apart(vectors: np.ndarray, labels: list[str]) -> float:
    """The accuracy of a ridge regression on the first two thirds, on the rest."""
    truth = np.array([1.0 if label == "right" else -1.0 for label in labels])
    train = 2 * len(truth) // 3
    centred = vectors - vectors[:train].mean(axis=0)
    gram = centred[:train] @ centred[:train].T
    ridge = gram + 1e-3 * np.trace(gram) / train * np.eye(train)
    slope = centred[:train].T @ np.linalg.solve(ridge, truth[:train])
    return float(((centred[train:] @ slope > 0) == (truth[train:] > 0)).mean())


def mean_over_frames(states: torch.Tensor, width: int) -> torch.Tensor:
    mean = states.mean(dim=1, keepdim=True).expand_as(states)
    return architecture.pool_frames(mean, width)


@pytest.mark.long
def test_motion_is_told_that_no_single_frame_shows(
    tmp_path: Path, seeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins: the middle frame alone, and a mean over frames, tell nothing."""
    names, labels = moving(tmp_path, 150)
    assert told_apart(vectors_of(seeing, tmp_path, names, labels), labels) > 0.85
    still, _ = moving(tmp_path, 150, still=True)
    assert told_apart(vectors_of(seeing, tmp_path, still, labels), labels) < 0.7
    monkeypatch.setattr(network_module, "pool_frames", mean_over_frames)
    assert told_apart(vectors_of(seeing, tmp_path, names, labels), labels) < 0.7


def test_a_hostile_neighbour_changes_no_bit(tmp_path: Path, seeing: Path) -> None:
    """On one core and on two. The twin: another clip, and the vector is another."""
    reasons = [*hostile(tmp_path)]
    fine = ["fine.avi", "fine.mp4"]
    labels = ["left", "right"]
    alone = vectors_of(seeing, tmp_path, fine, labels)
    beside = [fine[0], *reasons, fine[1]]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = vectors_of(seeing, tmp_path, beside, ["left"] * len(beside))
            assert found.tobytes() == alone.tobytes()
    finally:
        torch.set_num_threads(threads)
    film(tmp_path / "fine.avi", 1)
    assert (vectors_of(seeing, tmp_path, fine, labels)[0] != alone[0]).any()


def test_a_projection_keeps_distances_whatever_the_batch(seeing: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(6, 8, 9, 24, generator=draw)
    found = architecture.pool_frames(states, 600)
    assert torch.allclose(found.norm(dim=1), torch.tensor(600.0).sqrt())
    for row in range(6):
        assert torch.equal(found[row], architecture.pool_frames(states[row : row + 1], 600)[0])
    flipped = architecture.pool_frames(states.flip(1), 600)
    assert (found @ flipped.T).diagonal().abs().max() < 0.2 * 600


def test_a_base_that_sees_reads_clips_only_where_the_plan_says_so(seeing: Path) -> None:
    base = find_base(str(seeing))
    tokenizer = load_tokenizer(base)
    assert modalities.reader(base, tokenizer).column == "image"
    assert modalities.reader(base, tokenizer, "video_text").column == "video"


def test_a_base_whose_positions_lie_in_a_plane_reads_no_clips(tmp_path: Path) -> None:
    base = find_base(str(qwen2_vl(tmp_path / "qwen2_vl")))
    with pytest.raises(ModelError, match="reads no clips"):
        modalities.reader(base, load_tokenizer(base), "video_text")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (Columns(video="video", text="t", label="label"), "each clip without a text"),
        (Columns(image="video", label="label"), "reads no image"),
        (Columns(text="t", label="label"), "no video column"),
    ],
)
def test_columns_that_a_head_alone_cannot_read(
    tmp_path: Path, seeing: Path, columns: Columns, says: str
) -> None:
    base = find_base(str(seeing))
    tokenizer = load_tokenizer(base)
    reader = modalities.reader(base, tokenizer, "video_text")
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")
    file = DataFile(path=path, columns=columns)
    with pytest.raises(DataError, match=says):
        load_dataset(file, plan_of(seeing), tokenizer, reader=reader)


def test_plans_without_clips_keep_their_digest() -> None:
    assert "video" not in Columns(image="i", label="l").model_dump()
    assert Columns(video="v", label="l").model_dump()["video"] == "v"
