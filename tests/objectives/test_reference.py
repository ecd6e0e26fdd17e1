"""The reference policy: the frozen base, never what was trained; each record has its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives import _tokens
from fedtune.core.objectives._interface import Batch
from tests.objectives.test_contract import case_of


@pytest.mark.parametrize("adapter", ["cut", "positions apart"])
def test_the_reference_is_the_policy_at_the_start(tiny_base: Path, adapter: str) -> None:
    case = case_of(tiny_base, "dpo", adapter)
    trained = case.network.trainable()
    (batch, *_) = CachedDataset(case.network, case.data).batches(range(len(case.data.examples)))
    assert batch.label.shape[0] * 2 == batch.mask.shape[0]
    with torch.no_grad():
        found, now = (f(case.network, batch).total for f in (_tokens.reference, _tokens.likelihood))
        case.network.load_trainable({n: np.zeros_like(a) for n, a in trained.items()})
        try:
            expected = _tokens.likelihood(case.network, batch).total
        finally:
            case.network.load_trainable(trained)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((now - expected).abs().max()) > 0.1
    assert all(p.requires_grad for p in case.network.parameters().values())


@pytest.mark.parametrize("adapter", ["cut", "positions apart"])
def test_the_reference_is_computed_once_and_stays_each_records_own(
    tiny_base: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(tiny_base, "dpo", adapter)
    data, trained = CachedDataset(case.network, case.data), case.network.trainable()
    asked, likelihood = [0], _tokens.likelihood

    def counted(network: Network, batch: Batch) -> _tokens.Likelihood:
        asked[0] += len(batch.index)
        return likelihood(network, batch)

    def each(records: list[int], data: CachedDataset) -> dict[int, torch.Tensor]:
        return {
            i: pair
            for batch in data.batches(records)
            for i, pair in zip(
                batch.index.tolist(),
                _tokens.reference(case.network, batch).total.view(-1, 2),
                strict=True,
            )
        }

    everyone = list(range(len(case.data.examples)))
    expected = each(everyone, CachedDataset(case.network, case.data))
    monkeypatch.setattr(_tokens, "likelihood", counted)
    each(everyone[::-2], data)
    case.network.load_trainable({n: a + 0.5 for n, a in trained.items()})  # as after some steps
    try:
        each(everyone, data)
        before = asked[0]
        again = each(everyone[::-1], data)
    finally:
        case.network.load_trainable(trained)
    assert asked[0] == before >= len(everyone)
    for record, pair in again.items():
        torch.testing.assert_close(pair, expected[record], rtol=1e-5, atol=1e-5)
    assert len({round(float(p.sum()), 3) for p in expected.values()}) > len(everyone) // 2
