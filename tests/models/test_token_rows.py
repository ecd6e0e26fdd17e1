"""A token for which the base has no row reaches no table of it: on a GPU that ends all work of the
process, so that one record would decide about every other one's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.bases.architecture import rows_of
from fedtune.core.bases.find import find_base
from fedtune.core.data.dataset import Dataset, Example, SoftTargets
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.loaded import load
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from fedtune.core.objectives.distill import Distill
from fedtune.core.training.unit_gradients import UnitGradientEngine
from tests.dp.conftest import study

BAD = 1  # the unit with the token


@pytest.fixture
def network(tiny_base: Path) -> Network:
    return build(study(base={"model": str(tiny_base), "dtype": "float32"}, lora={"rank": 2}))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How far beyond a table each look-up asked, before its first row or after its last."""
    largest: list[int] = []
    gather, embedding = torch.Tensor.gather, torch.nn.functional.embedding

    def note(ids: torch.Tensor, width: int) -> None:
        largest.append(max(int(ids.max()) - width, -1 - int(ids.min())))

    def gather_and_note(table: torch.Tensor, dim: int, ids: torch.Tensor) -> torch.Tensor:
        note(ids, table.shape[dim])
        return gather(table, dim, ids)

    def embed_and_note(
        ids: torch.Tensor, table: torch.Tensor, *more: Any, **named: Any
    ) -> torch.Tensor:
        note(ids, table.shape[0])
        return embedding(ids, table, *more, **named)

    monkeypatch.setattr(torch.Tensor, "gather", gather_and_note)
    monkeypatch.setattr(torch.nn.functional, "embedding", embed_and_note)
    yield largest


def with_token(example: Example, token: int, place: str) -> Example:
    if place == "a teacher's token":
        assert example.soft is not None
        tokens = example.soft.tokens.copy()
        tokens[-1, -1] = token
        return replace(example, soft=SoftTargets(tokens, example.soft.logp))
    ids, targets = example.input_ids.copy(), example.target_ids.copy()
    (ids if place == "in the text" else targets)[-1] = token
    return replace(example, input_ids=ids, target_ids=targets)


def with_teacher(example: Example) -> Example:
    """With two likely tokens of a teacher at each target."""
    count = int((example.target_ids >= 0).sum())
    tokens = np.tile(np.array([3, 4], dtype=np.int32), (count, 1))
    return replace(example, soft=SoftTargets(tokens, np.full(tokens.shape, -1.0, np.float32)))


@pytest.mark.parametrize("token", ["beyond", -7])
@pytest.mark.parametrize("place", ["in the text", "its last target", "a teacher's token"])
def test_its_record_alone_takes_no_part(
    network: Network, asked: list[int], place: str, token: int | str
) -> None:
    plan = study(base={"model": "m"}, lora={"rank": 2})
    examples = list(random_records(network, plan, 6, 8).examples)
    objective: Any = plan.objective.resolved
    if place == "a teacher's token":
        examples = [with_teacher(example) for example in examples]
        objective = Distill(teacher="t", digest="sha256:" + 64 * "0")
    rows = {}
    for name in ("whole", "struck"):
        if name == "struck":
            examples[BAD] = with_token(
                examples[BAD], token if isinstance(token, int) else network.rows, place
            )
        data = CachedDataset(network, Dataset(examples, len(examples), Counter()))
        rows[name] = UnitGradientEngine(data, objective).matrix(range(len(examples)))
    others = [row for row in range(len(examples)) if row != BAD]
    assert torch.equal(rows["struck"][others], rows["whole"][others])
    assert rows["whole"][BAD].any() and not rows["struck"][BAD].any()
    assert asked and max(asked) < 0


def test_a_teacher_is_not_asked_about_it(tiny_base: Path, asked: list[int]) -> None:
    model = load(str(tiny_base))
    rows = model.model.get_input_embeddings().weight.shape[0]
    ids = np.arange(5)
    assert len(model.next_tokens(ids, ids)) == 5
    for token in (rows, -7):
        with pytest.raises(IndexError, match="no row"):
            model.next_tokens(np.array([1, token]), np.array([0]))
    assert max(asked) < 0 and find_base(str(tiny_base)).digest == model.digest


def test_a_further_table_counts(tiny_base: Path) -> None:
    """The configuration of the text states its size; it may be smaller than the embeddings'."""
    model = load(str(tiny_base)).model
    rows = len(model.get_input_embeddings().weight)
    assert rows_of(model.config, model.lm_head) == rows
    model.config.vocab_size_per_layer_input = rows - 3
    assert rows_of(model.config, model.lm_head) == rows - 3
