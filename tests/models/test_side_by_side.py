"""No architecture whose blocks are computed side by side writes to a module while it reads.

Two threads read with the same modules. What a forward pass sets on one, to use it a few lines
later, another thread's record would change in between: without an error, and not at each try."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedtune.core.bases.architecture import _TEXTS
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.media import image
from tests.models.test_media import ASK, SAY, folder, network_of
from tests.models.test_media import read as read_files

__all__ = ["folder"]  # a fixture

SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    **{"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "embedding_size": 32},
    **{"global_attn_every_n_layers": 2, "num_hidden_groups": 1, "sliding_window": 16},
    **{"cls_token_id": 1, "sep_token_id": 2},
}


def build_tiny(kind: str) -> PreTrainedModel:
    """Build a model of an architecture with random weights, of two narrow layers."""
    known = vars(CONFIG_MAPPING[kind]())
    sizes = {name: value for name, value in SIZES.items() if name in known or name == "head_dim"}
    if "layer_types" in known and known["layer_types"] is not None:
        sizes["layer_types"] = known["layer_types"][:2]
    return AutoModel.from_config(CONFIG_MAPPING[kind](**sizes)).eval()


@contextmanager
def written() -> Iterator[list[str]]:
    """Collect the names of attributes that any module is given, and of those that it loses."""
    found: list[str] = []
    sets, deletes = nn.Module.__setattr__, nn.Module.__delattr__

    def set_(self: nn.Module, name: str, value: Any) -> None:
        found.append(f"{type(self).__name__}.{name}")
        sets(self, name, value)

    def delete(self: nn.Module, name: str) -> None:
        found.append(f"{type(self).__name__}.{name}")
        deletes(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", set_)
        patch.setattr(nn.Module, "__delattr__", delete)
        yield found


def read(model: nn.Module) -> None:
    for length in (4, 16):
        ids = torch.arange(3, 3 + 2 * length).view(2, length)
        extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
        states.last_hidden_state.sum().backward()


@pytest.mark.parametrize("kind", _TEXTS.split())
def test_reading_writes_to_no_module(kind: str) -> None:
    model = build_tiny(kind)
    read(model)  # transformers installs its hooks
    with written() as found:
        read(model)
    assert found == []


@pytest.mark.parametrize("name", ["idefics3", "llava", "qwen2_vl", "whisper"])
@pytest.mark.parametrize("last_layers", [2, None])
def test_files_are_read_without_a_write_and_equally_on_any_number_of_cores(
    folder: Path, name: str, last_layers: int | None
) -> None:
    """The first reading is before: transformers then installs its hooks."""
    network = network_of(folder, name, last_layers=last_layers, modules=("q_proj",))
    dataset = read_files(folder, network, SAY if name == "whisper" else ASK)
    engine = UnitGradientEngine(CachedDataset(network, dataset), CausalLM())
    found, before = [engine.matrix(range(engine.n_rows))], torch.get_num_threads()
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            network.states.clear()
            engine = UnitGradientEngine(CachedDataset(network, dataset), CausalLM())
            with written() as names:
                found.append(engine.matrix(range(engine.n_rows)))
            assert {n.rpartition(".")[2] for n in names} <= {"forward"}  # of our own engine
    finally:
        torch.set_num_threads(before)
    assert found[0].any() and all(torch.equal(rows, found[0]) for rows in found)


def long_and_short(folder: Path, network: Network) -> CachedDataset:
    """Six records of images whose texts are of different lengths, so that each is a block."""
    texts = ["is there " + "a mass " * (1 + 3 * number) + "?" for number in range(6)]
    rows = [
        {"q": text, "a": " yes", "image": image(folder / f"of-{n}.png", n)}
        for n, text in enumerate(texts)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CachedDataset(network, read_files(folder, network, ASK, max_length=512))


@pytest.fixture
def three_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_cores")
def test_a_file_that_cannot_be_encoded_costs_its_own_record(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are made ahead of their turn: those that wait are not to blame."""
    network = network_of(folder, "idefics3", last_layers=1, modules=("down_proj",))
    data = long_and_short(tmp_path, network)
    bad, honest = data.dataset.examples[4].media, network.reader.tensor

    def tensor(file: Any) -> torch.Tensor:
        if file.digest == bad.digest:
            raise ValueError("the tower cannot read it")
        return honest(file)

    monkeypatch.setattr(network.reader, "tensor", tensor)
    data.warm()
    assert data._failed == {4}


@pytest.mark.usefixtures("three_cores")
def test_a_record_that_fails_beside_others_is_tried_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for one pass at a time: another record's pass is why it fails."""
    network = network_of(folder, "idefics3", last_layers=1, modules=("down_proj",))
    data = long_and_short(tmp_path, network)
    honest, beside, here = Network.prefix, [], threading.Barrier(2)

    def prefix(self: Network, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            with suppress(threading.BrokenBarrierError):
                here.wait(5)  # seconds; two are in their passes
                beside.append(ids.shape[1])
                raise MemoryError
        return honest(self, ids, *rest)

    monkeypatch.setattr(Network, "prefix", prefix)
    data.warm()
    assert beside and data._failed == set()


def test_a_module_that_keeps_something_for_its_next_line_is_seen() -> None:
    """The twin."""
    model = build_tiny("llama")
    read(model)
    layer, forward = model.layers[0], type(model.layers[0]).forward

    def keeps(hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        layer.length = hidden_states.shape[1]
        return forward(layer, hidden_states[:, : layer.length], **more)

    layer.forward = keeps
    with written() as found:
        read(model)
    assert "LlamaDecoderLayer.length" in found
