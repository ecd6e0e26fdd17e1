"""Merged factors against the updates themselves, in fp64 and by the definitions of the papers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from fedtune.core.errors import ConfigError
from fedtune.core.models.lora import Arrays
from fedtune.derive.merge_methods import RIDGE, Adapter, Method, merge

LAYERS = {"down_proj": (48, 24), "q_proj": (24, 24)}  # inputs, outputs


def adapter(seed: int, rank: int, blocks: tuple[int, ...] = (2, 3), **kinds: bool) -> Adapter:
    draw = np.random.default_rng(seed)
    arrays: Arrays = {}
    for block in blocks:
        for kind, (inputs, outputs) in LAYERS.items():
            if not kinds.get(kind, True):
                continue
            name = f"base_model.model.model.layers.{block}.mlp.{kind}"
            arrays[f"{name}.lora_A.default.weight"] = draw.normal(size=(rank, inputs)).astype("f4")
            arrays[f"{name}.lora_B.default.weight"] = draw.normal(size=(outputs, rank)).astype("f4")
    return Adapter(arrays, 2.0)


def updates(arrays: Arrays, scaling: float) -> dict[str, np.ndarray]:
    """scaling · B A by layer, fp64."""
    found = {}
    for name in arrays:
        if "lora_A" in name:
            b = arrays[name.replace("lora_A", "lora_B")].astype(np.float64)
            found[name.split(".lora_")[0]] = scaling * b @ arrays[name].astype(np.float64)
    return found


def both(one: Adapter, other: Adapter, name: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = (updates(each.arrays, each.scaling) for each in (one, other))
    like = a[name] if name in a else b[name]
    return a.get(name, np.zeros_like(like)), b.get(name, np.zeros_like(like))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() <= 2e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("ranks", [(4, 4), (2, 5)])
def test_linear_is_the_weighted_sum_of_the_updates(ranks: tuple[int, int]) -> None:
    one, other = adapter(1, ranks[0]), adapter(2, ranks[1], blocks=(3,))
    arrays, rank = merge([one, other], [1.0, -0.5], "linear")
    assert rank == sum(ranks)
    merged = updates(arrays, 1.0)
    assert len(merged) == 4
    for name, found in merged.items():
        a, b = both(one, other, name)
        assert close(found, a - 0.5 * b)
        assert not close(found, a + 0.5 * b) or not b.any()


def test_adding_up_the_factors_apart_would_not_be_the_sum_of_the_updates() -> None:
    """What PEFT calls "linear": the twin that the test above must tell apart."""
    one, other = adapter(1, 4), adapter(2, 4)
    summed = {name: one.arrays[name] + other.arrays[name] for name in one.arrays}
    for name, found in updates(summed, 2.0).items():
        a, b = both(one, other, name)
        assert not close(found, a + b)


def test_svd_is_the_nearest_update_of_its_rank() -> None:
    one, other = adapter(1, 4), adapter(2, 4)
    arrays, rank = merge([one, other], [1.0, 1.0], "svd", rank=3)
    assert rank == 3
    for name, found in updates(arrays, 1.0).items():
        a, b = both(one, other, name)
        u, s, v = np.linalg.svd(a + b)
        assert close(found, (u[:, :3] * s[:3]) @ v[:3])
    whole, rank = merge([one, other], [1.0, 1.0], "svd", rank=8)
    for name, found in updates(whole, 1.0).items():
        assert close(found, sum(both(one, other, name)))


def test_slerp_walks_along_the_arc() -> None:
    one, other = adapter(1, 4), adapter(2, 3)
    arrays, _ = merge([one, other], [3.0, 1.0], "slerp")
    for name, found in updates(arrays, 1.0).items():
        a, b = both(one, other, name)
        angle = math.acos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
        expected = (math.sin(0.75 * angle) * a + math.sin(0.25 * angle) * b) / math.sin(angle)
        assert close(found, expected)


def test_slerp_of_one_and_the_same_is_itself() -> None:
    one = adapter(1, 4)
    arrays, _ = merge([one, one], [1.0, 1.0], "slerp")
    for name, found in updates(arrays, 1.0).items():
        assert close(found, both(one, one, name)[0])


def test_ties_keeps_what_is_large_and_agrees_in_sign() -> None:
    one, other = adapter(1, 4), adapter(2, 4)
    arrays, _ = merge([one, other], [1.0, 1.0], "ties", density=0.4, rank=24)
    for name, found in updates(arrays, 1.0).items():
        trimmed = []
        for update in both(one, other, name):
            least = np.sort(np.abs(update).ravel())[-int(0.4 * update.size)]
            trimmed.append(np.where(np.abs(update) >= least, update, 0.0))
        sign = np.sign(sum(trimmed))
        agree = [np.where(np.sign(t) == sign, t, 0.0) for t in trimmed]
        count = sum((np.sign(t) == sign) & (t != 0) for t in trimmed)
        assert close(found, sum(agree) / np.maximum(count, 1))


def test_dare_drops_at_random_and_scales_up_and_a_seed_draws_again() -> None:
    one, other = adapter(1, 4), adapter(2, 4)
    again = [
        merge([one, other], [1.0, 1.0], "dare", density=0.5, rank=24, seed=s) for s in (3, 3, 4)
    ]
    first, second, third = (updates(arrays, 1.0) for arrays, _ in again)
    for name, found in first.items():
        assert close(found, second[name]) and not close(found, third[name])
        a, b = both(one, other, name)
        possible = np.stack([0 * a, 2 * a, 2 * b, 2 * a + 2 * b])
        gap = np.abs(possible - found).min(axis=0).max()
        assert gap < 1e-3 * np.abs(possible).max()


def inputs_of(one: Adapter, seed: int) -> dict[str, np.ndarray]:
    """What reaches each layer, (positions, inputs): few positions, one strong common direction."""
    draw = np.random.default_rng(seed)
    sizes = {name: update.shape[1] for name, update in updates(one.arrays, 1.0).items()}
    found = {name: draw.normal(size=(12, size)) + 3.0 for name, size in sizes.items()}
    return dict(sorted(found.items()))


def test_regmean_is_nearest_to_each_update_on_its_own_inputs() -> None:
    one, other = adapter(1, 4), adapter(2, 3)
    seen = inputs_of(one, 5), inputs_of(other, 6)
    moments = [{n: torch.from_numpy(x.T @ x / len(x)) for n, x in each.items()} for each in seen]
    arrays, rank = merge([one, other], [1.0, 2.0], "regmean", moments=moments)
    plain, _ = merge([one, other], [1.0, 1.0], "linear")
    assert rank == 7
    for name, found in updates(arrays, 1.0).items():
        pair = both(one, other, name)
        grams = [w * m[name].numpy() for w, m in zip((1.0, 2.0), moments, strict=True)]
        total = sum(grams)
        ridge = RIDGE * np.trace(total) / len(total) * np.eye(len(total))
        expected = sum(u @ g for u, g in zip(pair, grams, strict=True)) @ np.linalg.inv(
            total + ridge
        )
        assert close(found, expected)
        for update, each in zip(pair, seen, strict=True):
            wanted = each[name] @ update.T
            error = np.linalg.norm(each[name] @ found.T - wanted) / np.linalg.norm(wanted)
            summed = each[name] @ updates(plain, 1.0)[name].T
            assert error < 0.5 * np.linalg.norm(summed - wanted) / np.linalg.norm(wanted)


def test_each_adapter_has_a_density_of_its_own() -> None:
    """ties and dare; its twin, one density for both, is another update."""
    one, other = adapter(1, 4), adapter(2, 4)
    arrays, _ = merge([one, other], [1.0, 1.0], "ties", density=[0.2, 0.9], rank=24)
    same, _ = merge([one, other], [1.0, 1.0], "ties", density=0.2, rank=24)
    for name, found in updates(arrays, 1.0).items():
        trimmed = []
        for update, share in zip(both(one, other, name), (0.2, 0.9), strict=True):
            least = np.sort(np.abs(update).ravel())[-int(share * update.size)]
            trimmed.append(np.where(np.abs(update) >= least, update, 0.0))
        sign = np.sign(sum(trimmed))
        agree = [np.where(np.sign(t) == sign, t, 0.0) for t in trimmed]
        count = sum((np.sign(t) == sign) & (t != 0) for t in trimmed)
        assert close(found, sum(agree) / np.maximum(count, 1))
        assert not close(found, updates(same, 1.0)[name])
    arrays, _ = merge([one, other], [1.0, 1.0], "dare", density=[1.0, 0.5], rank=24)
    for name, found in updates(arrays, 1.0).items():
        a, b = both(one, other, name)
        possible = np.stack([a, a + 2 * b])  # the first whole, of the second a half, twice
        assert np.abs(possible - found).min(axis=0).max() < 1e-3 * np.abs(possible).max()


def test_one_density_for_each_is_the_same_as_one_for_all() -> None:
    one, other = adapter(1, 4), adapter(2, 4)
    for method in ("ties", "dare"):
        first, second = (
            merge([one, other], [1.0, 1.0], method, density=density, rank=24)[0]
            for density in (0.5, [0.5, 0.5])
        )
        assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="3 densities for 2 adapters"):
        merge([one, other], [1.0, 1.0], "ties", density=[0.5, 0.5, 0.5])


def test_density_one_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge([adapter(1, 2), adapter(2, 2)], [1.0, 1.0], "dare", density=1.0)
        merge([adapter(1, 2), adapter(2, 2)], [1.0, 1.0], "dare", density=[1.0, 0.5])


@pytest.mark.parametrize("method", ["linear", "svd", "ties", "dare", "slerp"])
def test_other_layers_are_filled_in_with_nothing(method: Method) -> None:
    """A plan says modules × last layers; what one parent lacks is there, and changes nothing."""
    one, other = (
        adapter(1, 3, blocks=(3,), q_proj=False),
        adapter(2, 3, blocks=(2, 3), down_proj=False),
    )
    arrays, rank = merge([one, other], [1.0, 1.0], method, density=1.0, rank=24)
    assert {array.shape[0] for name, array in arrays.items() if "lora_A" in name} == {rank}
    merged = updates(arrays, 1.0)
    assert len(merged) == 4
    absent = "base_model.model.model.layers.2.mlp.down_proj"
    assert not merged[absent].any()
    if method != "slerp":
        name = "base_model.model.model.layers.2.mlp.q_proj"
        assert close(merged[name], both(one, other, name)[1])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    merge([adapter(1, 2), adapter(2, 2)], [1.0, 1.0], "dare")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("weights", "method", "density", "says"),
    [
        ([1.0], "linear", 0.5, "one weight for each"),
        ([1.0, math.nan], "linear", 0.5, "not finite"),
        ([1.0, -1.0], "slerp", 0.5, "merges exactly two adapters"),
        ([1.0, 1.0], "ties", 0.0, "density"),
        ([1.0, 0.0], "regmean", 0.5, "how much an adapter counts"),
    ],
)
def test_what_makes_no_sense_is_refused(
    weights: list[float], method: Method, density: float, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        merge([adapter(1, 2), adapter(2, 2)], weights, method, density=density)


def test_a_head_is_refused() -> None:
    one = adapter(1, 2)
    headed = Adapter({**one.arrays, "head.weight": np.zeros((2, 2), "f4")}, 1.0)
    with pytest.raises(ConfigError, match=r"head.*cannot be merged"):
        merge([one, headed], [1.0, 1.0], "linear")
