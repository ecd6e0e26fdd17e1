"""Several passages in one pass say what each says alone, and writing copies no weight for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.bases.find import find_base
from fedtune.core.errors import ModelError
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.models.network import Network
from tests.dp.conftest import study

PASSAGES = [np.array(ids, np.int32) for ids in ([5, 6, 7, 8, 9], [7], [9, 5, 5])]


def with_head(folder: Path, base: Path, objective: dict[str, object]) -> LoadedModel:
    made = study(base={"model": str(base)}, lora=None, objective=objective)
    network = Network(find_base(str(base)), torch.float32, None, 2)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(size=a.shape) for n, a in network.trainable().items()}
    network.load_trainable({n: a.astype(np.float32) for n, a in arrays.items()})
    network.save(folder / "adapter")
    (folder / "plan.json").write_text(made.model_dump_json())
    return load(folder)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_encoder"])
def test_scores_of_several_are_those_of_each(
    tmp_path: Path, base: str, request: pytest.FixtureRequest
) -> None:
    objective = {"name": "classify", "labels": ["a", "b"], "max_length": 64}
    whole = with_head(tmp_path, request.getfixturevalue(base), objective)
    alone = torch.stack([whole.scores(ids) for ids in PASSAGES])
    torch.testing.assert_close(whole.scores_all(PASSAGES), alone, rtol=1e-5, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 0.01


def test_next_tokens_of_several_are_those_of_each(tiny_base: Path) -> None:
    whole = load(tiny_base)
    at = [np.arange(len(ids)) for ids in PASSAGES]
    for ids, places, found in zip(PASSAGES, at, whole.next_tokens_all(PASSAGES, at), strict=True):
        torch.testing.assert_close(found, whole.next_tokens(ids, places), rtol=1e-5, atol=1e-5)


def test_a_base_without_a_head_scores_nothing(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="no trained head"):
        load(tiny_base).scores(PASSAGES[0])


@pytest.mark.parametrize("broken", [False, True])
def test_the_head_is_given_states_in_one_piece(tiny_base: Path, broken: bool) -> None:
    """A view has its weight copied for each passage; the twin, without the hook, is given one."""
    model = load(tiny_base).model
    if broken:
        model.lm_head._forward_pre_hooks.clear()
    pieces: list[bool] = []
    model.lm_head.register_forward_pre_hook(
        lambda _, given: pieces.append(given[0].is_contiguous())
    )
    model.generate(input_ids=torch.tensor([[5, 6, 7], [7, 8, 9]]), max_new_tokens=2, pad_token_id=0)
    assert all(pieces) is not broken and len(pieces) == 2
