"""A base that computes on the records of a block together is refused, or has blocks of one record.

Twins: the same bases where the wall is open; a base that adds up its neighbours, under the name of
an architecture whose records may share a block."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BltConfig,
    BltForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlavaConfig,
    PreTrainedModel,
)

from fedtune.core.bases import architecture, find
from fedtune.core.bases.architecture import may_share_blocks
from fedtune.core.bases.find import find_base, load_backbone, load_tokenizer
from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ModelError
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from fedtune.core.registry import process_cache
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import study

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gemma4() -> PreTrainedModel:
    """It has further embeddings of each token, and looks for tokens across the block's rows."""
    layers = ["full_attention", "full_attention"]
    config = Gemma4TextConfig(
        **SIZES,
        **SPECIAL,
        global_head_dim=8,
        layer_types=layers,
        vocab_size_per_layer_input=300,
        hidden_size_per_layer_input=8,
    )
    return Gemma4ForCausalLM(config)


def blt() -> PreTrainedModel:
    """It divides all texts of a block into as many patches as one of them needs."""
    wide = {**SIZES, "hidden_size_global": 64, "cross_attn_k": 2}
    config = BltConfig(
        vocab_size=300,
        encoder_hash_byte_group_vocab=50,
        encoder_hash_byte_group_size=[3],
        cross_attn_k=2,
        max_position_embeddings=64,
        patcher_config=dict(SIZES),
        encoder_config=wide,
        decoder_config=dict(wide),
        global_config={**SIZES, "hidden_size": 64, "head_dim": 16},
        **SPECIAL,
    )
    return BltForCausalLM(config)


@pytest.mark.parametrize(("make", "wall"), [(gemma4, "PER_LAYER"), (blt, "COUPLING")])
def test_a_base_that_couples_records_by_design_is_refused(
    make: Any, wall: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    load_tokenizer(find_base(str(tiny_base))).save_pretrained(tmp_path)
    base = find_base(str(tmp_path))
    with pytest.raises(ModelError, match="fedtune has not tried"):
        load_backbone(base, torch.float32)
    monkeypatch.setattr(find, wall, ())
    model = load_backbone(base, torch.float32)
    assert not may_share_blocks(model.config)  # a second wall


def rows(network: Network, count: int) -> torch.Tensor:
    plan = study(base={"model": "m"}, lora={"rank": 2})
    examples = random_records(network, plan, 6, 8).examples[:count]
    network.states.clear()
    data = CachedDataset(network, Dataset(examples, count, Counter()))
    return UnitGradientEngine(data, plan.objective.resolved).matrix(range(count))


@pytest.mark.parametrize("listed", [False, True])
def test_a_block_of_an_architecture_that_is_not_listed_is_one_record(
    listed: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no record reaches another, though the base adds up its neighbours."""
    if not listed:
        monkeypatch.setattr(architecture, "SHARING", architecture.SHARING - {"llama"})
    prefix = Network.prefix

    def mixed(network: Network, *inputs: Any) -> torch.Tensor:
        states = prefix(network, *inputs)
        return states + 0.1 * states.mean(dim=0, keepdim=True)

    monkeypatch.setattr(Network, "prefix", mixed)
    process_cache.clear("networks")
    made = study(
        base={"model": str(tiny_base), "dtype": "float32"},
        lora={"rank": 2, "modules": ["q_proj"], "last_layers": 1},
    )
    try:
        network = build(made)
        network.load_trainable({n: a + 0.1 for n, a in network.trainable().items()})
        assert torch.equal(rows(network, 6)[:3], rows(network, 3)) != listed
    finally:
        process_cache.clear("networks")


def test_a_part_that_is_not_listed_counts() -> None:
    assert may_share_blocks(LlavaConfig())
    assert not may_share_blocks(LlavaConfig(text_config={"model_type": "blt"}))
