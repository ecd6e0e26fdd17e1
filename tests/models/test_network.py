"""One base, cut and adapted: exactness, isolation from padding, save and load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.config import LoraTable, Study
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models import build as build_module
from fedtune.core.models import lora as lora_module
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.models.split import cut
from fedtune.core.objectives._shapes import padded_length
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.registry import process_cache
from fedtune.core.training import local_round
from fedtune.core.training.local_round import check_trains
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.public.factor import public_factor
from fedtune.public.start import start
from tests.dp.conftest import records, study

MODULES = ("q_proj", "gate_proj", "down_proj")


def make(base: Path, **changes: object) -> Network:
    table = LoraTable.model_validate(
        {"rank": 4, "alpha": 8.0, "modules": MODULES} | changes, strict=False
    )
    return Network(find_base(str(base)), torch.float32, table, labels=0)


def randomise(network: Network) -> None:
    draw = np.random.default_rng(3)
    network.load_trainable(
        {n: draw.normal(size=a.shape).astype(np.float32) for n, a in network.trainable().items()}
    )


def logits(network: Network, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden = network.hidden(network.prefix(ids, mask), mask)
        return network.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)


@pytest.mark.parametrize("last_layers", [1, 2, 4, None])
def test_cut_and_cached_equals_the_whole_model(tiny_base: Path, last_layers: int | None) -> None:
    network = make(tiny_base, last_layers=last_layers)
    randomise(network)
    ids = torch.randint(3, 280, (3, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network.model(input_ids=ids).logits
    assert float((logits(network, ids) - whole).abs().max()) < 1e-5


def test_an_architecture_that_cannot_be_cut_is_not(tiny_encoder: Path) -> None:
    from fedtune.core.bases.find import load_backbone

    table = LoraTable(modules=("query",), last_layers=1)
    assert cut(load_backbone(find_base(str(tiny_encoder)), torch.float32), table) is None


def test_adapters_in_the_last_mlp_need_the_target_positions_alone(tiny_base: Path) -> None:
    """Cut behind the last attention: the same losses and gradients as the whole model's."""
    deep = make(tiny_base, last_layers=1, modules=["gate_proj", "down_proj"])
    flat = make(tiny_base, last_layers=None, modules=["gate_proj", "down_proj"])
    assert deep.positionwise
    assert not make(tiny_base, last_layers=1).positionwise  # q_proj lies in the attention
    assert not make(tiny_base, last_layers=2, modules=["down_proj"]).positionwise
    draw = np.random.default_rng(3)
    for name, array in (values := flat.trainable()).items():
        last = ".layers.3." in name
        values[name] = draw.normal(size=array.shape).astype(np.float32) * last
    flat.load_trainable(values)
    flat.load_frozen({n: deep.frozen_factor().get(n, a) for n, a in flat.frozen_factor().items()})
    deep.load_trainable({n: values[n] for n in deep.trainable()})
    dataset = records([1, 2, 1, 3])
    both = []
    for network in (deep, flat):
        data = CachedDataset(network, dataset)
        engine = UnitGradientEngine(data, CausalLM())
        names = network.parameters()
        rows = engine.matrix(range(4))
        pieces = torch.split(rows, [p.numel() for p in names.values()], dim=1)
        found = dict(zip(names, pieces, strict=True))
        with torch.no_grad():
            order = {}
            for batch in data.batches(range(7)):
                losses = CausalLM().losses(network, batch)
                order |= dict(zip(batch.index.tolist(), losses.tolist(), strict=True))
        both.append((found, order))
    (mine, my_losses), (theirs, their_losses) = both
    assert my_losses == pytest.approx(their_losses, rel=1e-5)
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-5 * float(theirs[name].abs().max()))


def test_padding_changes_nothing(tiny_base: Path) -> None:
    network = make(tiny_base, last_layers=2)
    randomise(network)
    ids = torch.randint(3, 280, (1, 20), generator=torch.Generator().manual_seed(0))
    short = torch.zeros(1, 32, dtype=torch.long)
    short[:, :20] = ids
    assert float((logits(network, short)[:, :20] - logits(network, ids)).abs().max()) < 1e-5


@pytest.mark.parametrize("length", [*range(1, 41), *range(41, 600, 7), 8192])
def test_the_padded_length_is_the_records_own(length: int) -> None:
    assert length <= padded_length(length) <= max(length + 7, length * 1.125)
    assert padded_length(padded_length(length)) == padded_length(length)


def test_only_b_is_trained_by_default_and_zero_b_changes_nothing(tiny_base: Path) -> None:
    network = make(tiny_base)
    assert all("lora_B" in name for name in network.trainable())
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    before = logits(network, ids)
    with network.base_only():
        assert torch.equal(before, logits(network, ids))
    assert all("lora_B" in name for name in network.trainable())  # PEFT would train A as well now
    assert any("lora_A" in n for n in make(tiny_base, train="AB").trainable())


def test_a_is_drawn_from_the_public_seed_alone(tiny_base: Path) -> None:
    network = make(tiny_base)
    torch.manual_seed(1)
    one = network.draw_factor(5)
    torch.manual_seed(2)
    assert lora_module.digest(one) == lora_module.digest(network.draw_factor(5))
    assert lora_module.digest(one) != lora_module.digest(network.draw_factor(6))


def test_a_is_loaded_again_only_after_something_wrote_to_it(tiny_base: Path) -> None:
    network = make(tiny_base)
    mine = network.draw_factor(5)
    name = next(iter(mine))
    mine[name][0, 0] += 1.0  # what shows whether these arrays are read once more
    network.load_frozen(mine)
    assert network.frozen_factor()[name][0, 0] != mine[name][0, 0]
    network.draw_factor(6)
    network.load_frozen(mine)
    assert lora_module.digest(network.frozen_factor()) == lora_module.digest(mine)
    with torch.no_grad():
        dict(network.model.named_parameters())[name].zero_()
    network.load_frozen(mine)
    assert lora_module.digest(network.frozen_factor()) == lora_module.digest(mine)


def test_arrays_of_another_shape_name_or_with_nan_are_refused(tiny_base: Path) -> None:
    network = make(tiny_base)
    good = network.trainable()
    name = next(iter(good))
    for bad in (
        {n: a for n, a in good.items() if n != name},
        good | {name: good[name][:-1]},
        good | {name: np.full_like(good[name], np.nan)},
        good | {"extra": np.zeros(1, dtype=np.float32)},
    ):
        with pytest.raises(ModelError):
            network.load_trainable(bad)
    assert all(np.array_equal(good[n], a) for n, a in network.trainable().items())


def test_an_unknown_module_lists_what_there_is(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="q_proj"):
        make(tiny_base, modules=["query"])


LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, out)
"""


@pytest.mark.parametrize("train", ["B", pytest.param("AB", marks=pytest.mark.long)])
def test_plain_peft_in_a_fresh_process_gives_the_same_logits(
    tiny_base: Path, tmp_path: Path, train: str
) -> None:
    network = make(tiny_base, last_layers=2, train=train)
    network.draw_factor(11)
    randomise(network)
    network.save(tmp_path / "adapter")
    ids = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(0))
    args = [str(tiny_base), str(tmp_path / "adapter"), str(tmp_path / "logits")]
    subprocess.run([sys.executable, "-c", LOAD, *args], check=True, capture_output=True)
    theirs = torch.load(tmp_path / "logits", weights_only=True)
    assert float((logits(network, ids) - theirs).abs().max()) < 1e-5
    with network.base_only():
        assert float((logits(network, ids) - theirs).abs().max()) > 1e-2


def test_public_rows_are_white_and_orthogonal_to_the_mean(tiny_base: Path) -> None:
    network = make(tiny_base, last_layers=2)
    factor = public_factor(network, records([1] * 60), rank=4)
    assert set(factor) == set(network.frozen_factor())
    for rows in factor.values():
        assert np.isfinite(rows).all()
        inner = np.abs(rows @ rows.T)
        off = inner - np.diag(np.diag(inner))
        assert off.max() < 1e-3 * inner.max()


def test_too_little_public_text_says_so(tiny_base: Path) -> None:
    network = make(tiny_base)
    one = records([1])
    one.examples[0].target_ids[:-1] = -100
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        public_factor(network, one, rank=4)


# ------------------------------------------------------------------- what happens before round 1


def full_study(base: Path, **changes: object) -> Study:
    return study(base={"model": str(base), "dtype": "float32"}, **changes)


def test_start_fills_in_what_sites_bind_to(tiny_base: Path) -> None:
    begun = start(full_study(tiny_base))
    assert begun.study.base.digest == find_base(str(tiny_base)).digest
    assert begun.study.lora is not None
    network = build(begun.study)
    assert begun.study.lora.a_digest == lora_module.digest(network.frozen_factor())
    assert begun.frozen == {}  # every site draws it from the seed
    assert all(not a.any() for a in begun.adapter.values())


def test_two_studies_in_one_process_start_alike(tiny_base: Path) -> None:
    first = start(full_study(tiny_base))
    randomise(build(first.study))
    again = start(full_study(tiny_base))
    assert again.study.digest == first.study.digest
    assert all(np.array_equal(first.adapter[n], a) for n, a in again.adapter.items())


def test_the_check_before_training_passes_and_puts_everything_back(tiny_base: Path) -> None:
    made = full_study(tiny_base)
    network = build(made)
    before = network.trainable()
    check_trains(made, network)
    assert all(np.array_equal(before[n], a) for n, a in network.trainable().items())


def test_the_check_catches_an_adapter_that_is_not_connected(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 14: adapters off, so ε would be spent and nothing learnt."""
    made = full_study(tiny_base)
    network = make(tiny_base, modules=["q_proj"])
    inside = network.hidden

    def off(*inputs: torch.Tensor) -> torch.Tensor:
        with network.base_only():
            return inside(*inputs).requires_grad_()

    monkeypatch.setattr(network, "hidden", off)
    with pytest.raises((ModelError, RuntimeError)):
        check_trains(made, network)


def test_the_check_catches_a_head_whose_rows_follow_their_place(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head is zero at first, and so are its products, whatever the place. Twin: the check with
    the arrays as they are at first."""
    objective = {"name": "classify", "labels": ["a", "b"]}
    made = study(base={"model": str(tiny_encoder)}, lora=None, objective=objective)
    network, honest = build(made), Network.logits

    def third_row_otherwise(self: Network, selected: torch.Tensor, *rest: Any) -> torch.Tensor:
        scale = torch.ones(len(selected), 1)
        scale[2] += 1e-3
        products = honest(self, selected, *rest)
        return products + (products * scale - products).detach()

    monkeypatch.setattr(Network, "logits", third_row_otherwise)
    with monkeypatch.context() as patch:
        patch.setattr(local_round, "_scatter", lambda arrays: arrays)
        check_trains(made, network)
    with pytest.raises(ModelError, match="depends on the other records"):
        check_trains(made, network)


def test_the_check_catches_a_gradient_of_the_wrong_sign(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.core.training.unit_gradients import UnitGradientEngine

    right = UnitGradientEngine._per_record

    def wrong(self: UnitGradientEngine, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        losses, gradients = right(self, batch)
        return losses, [part.neg() for part in gradients]

    monkeypatch.setattr(UnitGradientEngine, "_per_record", wrong)
    with pytest.raises(ModelError, match="did not lower"):
        check_trains(full_study(tiny_base), build(full_study(tiny_base)))


def test_states_at_the_cut_are_computed_once(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(tiny_base, last_layers=2)
    data = CachedDataset(network, records([1, 2, 3]))
    list(data.batches(range(6)))
    monkeypatch.setattr(network, "prefix", lambda *_: pytest.fail("computed twice"))
    assert sum(len(b.index) for b in data.batches(range(6))) == 6


# ------------------------------------------------------------------------------ encoder and head


def test_a_head_alone_sees_one_pooled_vector(tiny_encoder: Path) -> None:
    network = Network(find_base(str(tiny_encoder)), torch.float32, None, labels=3)
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    states = network.prefix(ids, mask)
    assert states.shape == (2, 1, 32)
    assert torch.allclose(states[:, 0].norm(dim=1), torch.tensor(32.0).sqrt(), rtol=1e-4)
    padded = torch.nn.functional.pad(ids, (0, 4))
    again = network.prefix(padded, torch.nn.functional.pad(mask, (0, 4)))
    assert float((again - states).abs().max()) < 1e-4
    assert set(network.trainable()) == {"head.weight", "head.bias"}


def test_who_sees_the_same_record_shares_its_states_and_nobody_keeps_them(tiny_base: Path) -> None:
    network = make(tiny_base, last_layers=2)
    one, two = CachedDataset(network, records([1, 2])), CachedDataset(network, records([1, 2]))
    one.warm()
    assert len(network.states) == 3
    two.warm()
    assert all(a is b for a, b in zip(one._states, two._states, strict=True))
    del one, two
    assert len(network.states) == 0


@pytest.mark.parametrize("last_layers", [None, 2])
def test_recomputing_changes_no_gradient_and_keeps_no_activations(
    tiny_base: Path, last_layers: int | None
) -> None:
    network = make(tiny_base, last_layers=last_layers)
    data = CachedDataset(network, records([1, 2, 3]))
    engine = UnitGradientEngine(data, CausalLM())
    plain, kept = engine.matrix(range(3)), saved_numbers(data)
    with network.recomputing(True):
        assert torch.allclose(engine.matrix(range(3)), plain, rtol=1e-5, atol=1e-8)
        assert saved_numbers(data) < kept / 2
    assert all("forward" not in vars(module) for module in network.model.modules())
    with network.recomputing(False):
        assert saved_numbers(data) == kept


def saved_numbers(data: CachedDataset) -> int:
    """How many numbers one forward pass keeps for the backward pass."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() if tensor.grad_fn is not None else 0
        return tensor

    (batch, *_) = data.batches(range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CausalLM().losses(data.network, batch)
    return total


@pytest.mark.parametrize("last_layers", [None, 1, 2])
def test_states_at_some_positions_are_those_of_all(
    tiny_base: Path, last_layers: int | None
) -> None:
    """With the last blocks adapted, the last MLP runs at these positions and nowhere else."""
    network = make(tiny_base, last_layers=last_layers)
    (batch, *_) = CachedDataset(network, records([3])).batches([0, 1, 2])
    keep = torch.tensor([[0, 2]]).expand(len(batch.index), 2)
    ran: list[int] = []
    last = network.trained.get_submodule("backbone.layers")[-1].mlp  # type: ignore[index, union-attr]
    handle = last.register_forward_hook(lambda _, inputs, out: ran.append(out.shape[1]))
    some = network.hidden(batch.prefix, batch.mask, keep)
    everywhere = network.hidden(batch.prefix, batch.mask)
    handle.remove()
    assert torch.allclose(some, everywhere[:, [0, 2]], rtol=1e-5, atol=1e-6)
    assert ran[0] == (2 if last_layers else batch.mask.shape[1])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0), (0.9, 1.0)])
def test_bf16_where_it_is_native_and_measures_faster(
    monkeypatch: pytest.MonkeyPatch, native: bool, seconds: tuple[float, float]
) -> None:
    """seconds: what products in bf16 and in fp32 take; a tenth is no reason."""
    took = iter(seconds)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(build_module.timeit, "repeat", lambda *_, **__: [next(took)])
    process_cache.clear("speed of bf16")
    expected = torch.bfloat16 if native and seconds == (1.0, 2.0) else torch.float32
    try:
        assert build_module.dtype_of("auto") == expected
    finally:
        process_cache.clear("speed of bf16")
    assert build_module.dtype_of("bfloat16") == torch.bfloat16


def test_a_gpu_that_emulates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts emulation as support by default: on a T4 it is several times slower."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, native=native: including_emulation or native,
        )
        process_cache.clear("speed of bf16")
        expected = torch.bfloat16 if native else torch.float32
        assert build_module.dtype_of("auto") == expected
    process_cache.clear("speed of bf16")
