"""Images and recordings through a network: equal to transformers' own model, frozen towers, caches
by the file's digest, and records made of the base folder's own processor."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from fedtune.core import modalities
from fedtune.core.bases import architecture, digest
from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Columns, DataFile, LoraTable
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.files import Rejected
from fedtune.core.data.load import load_dataset
from fedtune.core.data.media import Media, keep_samples, length, load, sound
from fedtune.core.errors import ConfigError, DataError, ModelError
from fedtune.core.modalities import audio_text
from fedtune.core.models import network as network_module
from fedtune.core.models import tiny
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from tests.dp.conftest import study
from tests.media import BASES, idefics3, image, llava, qwen2_vl, recording, whisper

ASK = Columns(image="image", prompt="q", completion="a")
SAY = Columns(audio="audio", text="a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seen")
    for make in BASES.values():
        make(root / make.__name__)
    rows = []
    for number in range(6):
        row = {"q": f"is there a mass {number}?", "a": " yes" if number % 2 else " no"}
        row["image"] = image(root / f"{number}.png", number, (20, 60 if number == 4 else 20))
        row["audio"] = recording(root / f"{number}.wav", number)
        rows.append(row | {"label": row["a"].strip()})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def network_of(folder: Path, name: str, **lora: Any) -> Network:
    table = LoraTable(**{"rank": 4, "alpha": 8.0} | lora)
    made = Network(find_base(str(folder / name)), torch.float32, table, 0)
    draw = np.random.default_rng(1)
    made.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) * 0.1 for n, a in made.trainable().items()}
    )
    return made


def read(folder: Path, network: Network, columns: Columns, **changes: Any) -> Dataset:
    objective = {"name": "causal_lm", "max_length": 128} | changes
    plan = study(base={"model": str(network.base.path)}, objective=objective)
    table = DataFile(path=folder / "data.jsonl", columns=columns)
    return load_dataset(table, plan, network.tokenizer, reader=network.reader)


def inputs(network: Network, example: Any) -> dict[str, torch.Tensor]:
    """What transformers' own forward is given for one record."""
    tensor = network.reader.tensor(example.media)
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    text = "decoder_input_ids" if network.kind == "speech" else "input_ids"
    return {text: ids, **architecture.inputs(network.model, network.kind, tensor, ids)}


KINDS: dict[str, tuple[str, Columns, dict[str, Any]]] = {
    "idefics3, positions apart": ("idefics3", ASK, {"modules": ("down_proj",), "last_layers": 1}),
    "idefics3, cut": ("idefics3", ASK, {"modules": ("q_proj", "up_proj"), "last_layers": 2}),
    "idefics3, projector": ("idefics3", ASK, {"modules": ("q_proj", "projector")}),
    "llava, cut": ("llava", ASK, {"modules": ("q_proj",), "last_layers": 2}),
    "llava, projector": ("llava", ASK, {"modules": ("q_proj", "projector")}),
    "qwen2-vl, positions apart": ("qwen2_vl", ASK, {"modules": ("down_proj",), "last_layers": 1}),
    "qwen2-vl, last blocks": ("qwen2_vl", ASK, {"modules": ("q_proj",), "last_layers": 2}),
    "qwen2-vl, projector": ("qwen2_vl", ASK, {"modules": ("q_proj", "projector")}),
    "whisper, positions apart": ("whisper", SAY, {"modules": ("fc1", "fc2"), "last_layers": 1}),
    "whisper, cut": ("whisper", SAY, {"modules": ("q_proj", "fc2"), "last_layers": 2}),
    "whisper, all": ("whisper", SAY, {"modules": ("q_proj", "k_proj")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_own_model(folder: Path, kind: str) -> None:
    name, columns, lora = KINDS[kind]
    network = network_of(folder, name, **lora)
    data = read(folder, network, columns)
    assert len(data.examples) == 6
    cached = CachedDataset(network, data)
    for index, example in enumerate(data.examples):
        (batch,) = cached.batches([index])
        hidden = network.hidden(batch.prefix, batch.mask, None, batch.tower_states)
        ours = network.logits(hidden[0][batch.target_ids[0] != -100])
        whole = network.model(**inputs(network, example)).logits[0]
        plain = whole[torch.from_numpy(example.target_ids != -100)]
        apart = float((ours - plain).detach().abs().max())
        assert torch.allclose(ours, plain, atol=2e-5), apart


@pytest.mark.parametrize("kind", ["qwen2-vl, positions apart", "qwen2-vl, last blocks"])
def test_positions_by_number_alone_are_caught(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: text and image stand in one line."""

    def in_line(holes: torch.Tensor) -> torch.Tensor:
        return torch.arange(holes.shape[1]).expand(3, *holes.shape)

    monkeypatch.setattr(network_module, "plane_positions", in_line)
    with pytest.raises(AssertionError):
        test_logits_are_those_of_transformers_own_model(folder, kind)


@pytest.mark.parametrize("start", [0, 7])
def test_positions_round_an_image_are_transformers_own(folder: Path, start: int) -> None:
    network = network_of(folder, "qwen2_vl")
    config, model = network.model.config, network.model.get_base_model().model  # type: ignore
    ids = torch.full((2, start + 9 + 6), 30)
    ids[:, start : start + 9] = config.image_token_id
    grid = torch.tensor([[1, 6, 6]] * 2)
    holes = ids == config.image_token_id
    theirs, _ = model.get_rope_index(ids, mm_token_type_ids=holes.int(), image_grid_thw=grid)
    assert torch.equal(architecture.plane_positions(holes), theirs)
    plain = torch.arange(ids.shape[1]).expand(3, 2, -1)
    assert torch.equal(architecture.plane_positions(torch.zeros_like(holes)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_is_frozen_and_bears_no_adapter(folder: Path, kind: str) -> None:
    name, _, lora = KINDS[kind]
    network = network_of(folder, name, **lora)
    trained = " ".join(network.parameters())
    assert not any(part in trained for part in ("vision", "visual.blocks", "encoder.layers"))
    between = any(part in trained for part in ("connector", "projector", "merger"))
    assert between == ("projector" in lora["modules"])
    base = [m for m in network.model.modules() if "transformers" in type(m).__module__]
    assert base and not any(m.training for m in base)  # no dropout, at any time


def sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def test_the_text_is_what_idefics3s_own_processor_writes(folder: Path) -> None:
    from transformers import Idefics3Processor

    network = network_of(folder, "idefics3")
    processor = Idefics3Processor(
        network.reader._processor,
        network.tokenizer,
        image_seq_len=4,  # type: ignore[attr-defined]
    )
    for example in read(folder, network, ASK).examples:
        ids = example.input_ids.tolist()
        (row,) = [
            r for r in map(json.loads, (folder / "data.jsonl").read_text().splitlines())
            if sha256(folder / r["image"]) == example.media.file  # type: ignore[union-attr]
        ]  # fmt: skip
        with Image.open(folder / row["image"]) as picture:
            theirs = processor(images=[[picture]], text="<image>" + row["q"], return_tensors="pt")
        prompt = theirs["input_ids"][0].tolist()
        assert ids[: len(prompt)] == prompt
        assert len(theirs["pixel_values"][0]) == example.tiles
        ours = network.reader.tensor(example.media)  # type: ignore[arg-type]
        assert torch.equal(ours[:, :3], theirs["pixel_values"][0].float())


def test_states_are_the_files_own(folder: Path) -> None:
    """The same words about another image have other states; the same image is looked at once."""
    network = network_of(folder, "idefics3", modules=("down_proj",), last_layers=1)
    data = read(folder, network, ASK)
    looked: list[bytes] = []
    honest = network.reader.tensor
    network.reader.tensor = lambda m: looked.append(m.digest) or honest(m)  # type: ignore
    one, two = data.examples[0], data.examples[1]
    same = type(one)(one.input_ids, one.target_ids, -100, 1, None, two.media, two.tiles)
    cached = CachedDataset(network, Dataset([one, same, one], 2, data.rejected))
    (batch,) = cached.batches([0, 1, 2])
    assert torch.equal(batch.prefix[0], batch.prefix[2])
    assert not torch.equal(batch.prefix[0], batch.prefix[1])
    assert len(looked) == len(set(looked)) == 2


def test_states_without_the_file_in_their_name_are_caught(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: states that go by the text alone."""
    from fedtune.core.models import cache

    honest = cache._name
    monkeypatch.setattr(cache, "_name", lambda passage, kept, media=b"": honest(passage, kept))
    network = network_of(folder, "idefics3", modules=("down_proj",), last_layers=1)
    one, two = read(folder, network, ASK).examples[:2]
    same = type(one)(one.input_ids, one.target_ids, -100, 1, None, two.media, two.tiles)
    nothing = read(folder, network, ASK).rejected
    first = CachedDataset(network, Dataset([one], 1, nothing))
    first.warm()
    second = CachedDataset(network, Dataset([same], 1, nothing))
    (a,), (b,) = first.batches([0]), second.batches([0])
    assert torch.equal(a.prefix, b.prefix)


def test_members_of_the_ledger_know_the_file(folder: Path) -> None:
    network = network_of(folder, "idefics3")
    data = read(folder, network, ASK)
    files = {b"media\0" + sha256(path) for path in folder.glob("*.png")}
    assert {b"media\0" + e.media.file for e in data.examples if e.media} <= files
    assert len(files & data.members) == 6
    assert read(folder, network, ASK).content_hash == data.content_hash


def test_place_holders_are_counted(folder: Path, tmp_path: Path) -> None:
    network = network_of(folder, "idefics3")
    image(tmp_path / "a.png", 1)
    rows = [{"image": "a.png", "q": "the <image> shows?", "a": "x"}]
    rows += [{"image": "a.png", "q": "and here?", "a": "x"}] * 2
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path, network, ASK).rejected == {"image token in the text": 1}
    with pytest.raises(DataError, match=r"answer too long"):
        read(tmp_path, network, ASK, max_length=16, overflow="truncate")
    with pytest.raises(Rejected, match="too long"):
        network.reader.check([5] * 3, tiles=5)


def test_a_template_stands_round_the_image(folder: Path) -> None:
    network = network_of(folder, "llava")
    data = read(folder, network, ASK, template="User: {text}\nAssistant:")
    text = network.tokenizer.decode(data.examples[0].input_ids)
    assert text.startswith("User: <image><image>")
    assert "Assistant:" in text


def test_a_recording_longer_than_the_window(folder: Path, tmp_path: Path) -> None:
    network = network_of(folder, "whisper")
    for number in range(2):
        recording(tmp_path / f"{number}.wav", number, seconds=1.5)
    rows = [{"audio": f"{n}.wav", "a": "x"} for n in range(2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="2 audio too long"):
        read(tmp_path, network, SAY)
    assert len(read(tmp_path, network, SAY, overflow="truncate").examples) == 2


@pytest.mark.parametrize("rate", [4_000, 11_025, 16_000, 44_100, 191_999])
@pytest.mark.parametrize("count", [1, 2, 999, 1000])
def test_how_long_a_recording_is_takes_no_conversion(rate: int, count: int) -> None:
    kept = Media.of("audio", keep_samples(np.zeros(count, np.float32), rate))
    assert length(kept, 16_000) == len(sound(kept, 16_000))


def test_a_recording_is_converted_for_no_record_that_the_cap_leaves_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of a few bytes would take a third of a second of the vault, each time."""
    converted = list[Media]()
    plain = audio_text.sound
    monkeypatch.setattr(
        audio_text, "sound", lambda media, rate: converted.append(media) or plain(media, rate)
    )
    recording(tmp_path / "a.wav", 0, seconds=0.1)
    rows = [{"audio": "a.wav", "a": f"word {number}"} for number in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(tmp_path, network_of(folder, "whisper"), SAY).examples) == 20
    assert not converted


@pytest.mark.parametrize(
    ("name", "columns", "says"),
    [
        ("idefics3", Columns(prompt="q", completion="a"), "no image column is named"),
        ("idefics3", SAY, "no image column is named"),
        ("whisper", ASK, "the base reads no image"),
        ("whisper", Columns(text="a"), "no audio column is named"),
        ("whisper", Columns(audio="audio", prompt="q", completion="a"), "reads no prompt"),
    ],
)
def test_columns_that_do_not_suit_the_base(
    folder: Path, name: str, columns: Columns, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        read(folder, network_of(folder, name), columns)


@pytest.mark.parametrize(("longest", "tokens"), [(24 * 24, 9), (31 * 31, 9), (10**9, 3136), (1, 1)])
def test_an_image_of_any_size_is_shown_on_one_square(
    folder: Path, tmp_path: Path, longest: int, tokens: int
) -> None:
    """As large as the base's processor leaves it, and at most 448 pixels a side."""
    copied = shutil.copytree(folder / "qwen2_vl", tmp_path / "base")
    settings = copied / "preprocessor_config.json"
    body = json.loads(settings.read_text())
    body["size"] = {"shortest_edge": 1, "longest_edge": longest}
    settings.write_text(json.dumps(body))
    reader = modalities.reader(base := find_base(str(copied)), load_tokenizer(base))
    for shape in ((20, 60), (9, 5)):
        media = load(tmp_path / image(tmp_path / "a.png", 1, shape), "image")
        assert reader.tensor(media).shape[:2] == (1, 4 * tokens)
    reader.check([reader._id] * tokens, tiles=1)  # type: ignore[attr-defined]
    body["size"] = {"shortest_edge": 500**2, "longest_edge": 500**2}
    settings.write_text(json.dumps(body))
    with pytest.raises(ModelError, match="takes no square of 448 pixels"):
        modalities.reader(base := find_base(str(copied)), load_tokenizer(base))


def test_a_text_base_refuses_images(folder: Path, tiny_base: Path) -> None:
    network = Network(find_base(str(tiny_base)), torch.float32, LoraTable(rank=2), 0)
    with pytest.raises(DataError, match="the base reads no image"):
        read(folder, network, ASK)


def test_modules_that_are_not_there(folder: Path, tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"some of .*'fc1'"):
        network_of(folder, "whisper", modules=("projector",))
    with pytest.raises(ConfigError, match=r"some of .*'projector'"):
        network_of(folder, "idefics3", modules=("fc9",))
    with pytest.raises(ConfigError, match="at most 3"):
        network_of(folder, "whisper", modules=("fc1",), last_layers=4)


def test_other_conditional_generators_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "t5"
    shutil.copytree(folder / "llava", copy)
    config = json.loads((copy / "config.json").read_text())
    config["architectures"] = ["T5ForConditionalGeneration"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not know the architecture T5For"):
        find_base(str(copy))


def test_the_digest_covers_what_prepares_the_files(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "idefics3"
    shutil.copytree(folder / "idefics3", copy)
    before = find_base(str(copy)).digest
    path = copy / "preprocessor_config.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"image_mean": [0.1, 0.1, 0.1]}))
    assert find_base(str(copy)).digest != before
    path.write_text(json.dumps(body | {"auto_map": {"AutoImageProcessor": "x.Y"}}))
    with pytest.raises(ModelError, match="remote code"):
        find_base(str(copy))


@pytest.mark.parametrize("make", [idefics3, llava, qwen2_vl, whisper])
def test_the_shrunk_base_is_the_same_architecture(folder: Path, make: Callable[..., Path]) -> None:
    base = find_base(str(folder / make.__name__))
    modules = ("fc1",) if make is whisper else ("q_proj",)
    plan = study(base={"model": str(base.path)}, lora={"modules": modules, "last_layers": 1})
    small = tiny.tiny_network(plan, base)
    assert small.kind == base.kind and small.hidden_size == 32
    records = tiny.generate_records(plan, small, [1, 2, 1])
    assert all(example.media for example in records.examples)
    again = tiny.generate_records(plan, small, [1, 2, 1])
    assert [e.media.digest for e in records.examples if e.media] == [
        e.media.digest for e in again.examples if e.media
    ]


def test_a_transcript_begins_as_whispers_own_tokenizer_has_it(tmp_path: Path) -> None:
    """In the language that the folder names, which its digest covers."""
    folder = whisper(tmp_path / "base")
    made: Any = AutoTokenizer.from_pretrained(folder)
    marks = ["<|de|>", "<|transcribe|>", "<|notimestamps|>"]
    made.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", *marks]})
    made.save_pretrained(folder)
    found = []
    for asked in ({}, {"language": "german", "task": "transcribe"}, {"predict_timestamps": True}):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings = {n: v for n, v in settings.items() if n not in digest.START} | asked
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        base = find_base(str(folder))
        reader: Any = modalities.reader(base, load_tokenizer(base))
        found.append((reader._start, base.digest))
    first = "<|startoftranscript|>"
    expected = [first + marks[2], first + "".join(marks), first]
    assert [start for start, _ in found] == expected and len({of for _, of in found}) == 3
