"""What rounding on the way does to a run: sites get a rounded adapter, the kept one is not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import Encoding, PublicTable, Study
from fedtune.core.models.lora import digest
from fedtune.core.vault.prepared import Update
from fedtune.core.wire import codec
from fedtune.server import bound, store, summary
from tests.server.fakes import SHAPES, FakeSite, make_parts, make_study

ENCODINGS: tuple[Encoding, ...] = ("float32", "float16", "int8")
ROUNDS, STEP = 40, 1e-4


class Recording(FakeSite):
    """Moves every number by STEP, and keeps what it was given to train from."""

    def train(self, digest: str, round_: int, adapter: Any, receipt: str) -> Update:
        self.given = [*getattr(self, "given", []), adapter]
        self.script[len(self.calls) + 1] = lambda update: Update(
            {n: np.full_like(a, STEP) for n, a in adapter.items()}, update.events
        )
        return super().train(digest, round_, adapter, receipt)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.uniform(0.5, 1, shape).astype(np.float32) for n, shape in SHAPES.items()}


def rounded(arrays: dict[str, np.ndarray], encoding: Encoding) -> dict[str, np.ndarray]:
    return codec.decode(codec.encode(arrays, encoding), codec.shapes(arrays))


def study(encoding: Encoding) -> Study:
    made = make_study(wire=encoding, min_sites=2)
    return made.model_copy(update={"training": made.training.model_copy(update={"rounds": ROUNDS})})


def ran(trial: Any, encoding: Encoding, folder: str = "t") -> tuple[Any, list[Recording]]:
    sites = [Recording("a"), Recording("b")]
    run = trial(*sites, folder=folder)

    def started(asked: Study) -> Any:
        return SimpleNamespace(study=asked, adapter=start(), frozen={}, strategy={})

    run.run(study(encoding), parts=make_parts(start=started))
    return run, sites


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounding_does_not_add_up_over_rounds(trial: Any, encoding: Encoding):
    """Updates far smaller than a step of the rounded adapter all arrive."""
    run, _ = ran(trial, encoding)
    adapter = run.adapter()
    for name, begun in start().items():
        moved = adapter[name].astype(np.float64) - begun
        np.testing.assert_allclose(moved, ROUNDS * STEP, rtol=0.002, atol=2e-6)


def test_an_adapter_that_is_kept_as_it_was_sent_is_caught(
    trial: Any, monkeypatch: pytest.MonkeyPatch
):
    """The twin: rounds its own adapter after every round, and so stands still."""
    from fedtune.strategies.fedavg import FedAvg

    honest = FedAvg.apply
    monkeypatch.setattr(FedAvg, "apply", lambda s, a: rounded(honest(s, a), "int8"))
    with pytest.raises(AssertionError):
        test_rounding_does_not_add_up_over_rounds(trial, "int8")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sites_train_from_the_kept_adapter_rounded_once(trial: Any, encoding: Encoding):
    run, (a, b) = ran(trial, encoding)
    kept = store.load(run.folder / "out", study(encoding))
    assert kept is not None
    first, last = a.given[0], rounded(kept.adapter, encoding)
    assert digest(first) == digest(rounded(start(), encoding))
    assert [digest(g) for g in a.given] == [digest(g) for g in b.given]
    for name in SHAPES:  # the last one given is one step behind what is kept
        assert np.abs(a.given[-1][name] - last[name]).max() < 1e-2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_bound_on_an_update_counts_from_the_adapter_that_was_sent(
    trial: Any, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
):
    """Decay and the proximal term pull by as much as it is long; rounded, it may be longer."""
    honest, starts = bound.norm_bound, list[float]()

    def seen(asked: Study, site: Any, dimension: int, start: float) -> float:
        starts.append(start)
        return honest(asked, site, dimension, start)

    monkeypatch.setattr(bound, "norm_bound", seen)
    _, (a, _) = ran(trial, encoding)
    assert len(starts) == 2 * ROUNDS
    for start, given in zip(starts[::2], a.given, strict=True):
        assert codec.length(given) <= start * (1 + 1e-6) <= 1.1 * codec.length(given)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_round_asked_for_again_has_the_same_adapter_digest(trial: Any, encoding: Encoding):
    """A site finds its kept update by that digest: other bytes would be paid for again."""
    first, second = (ran(trial, encoding, folder)[1][0].given for folder in ("one", "two"))
    assert [digest(a) for a in first] == [digest(a) for a in second]


def test_the_report_says_how_numbers_travelled(trial: Any, tmp_path: Path):
    run, _ = ran(trial, "int8")
    kept = store.load(run.folder / "out", study("int8"))
    assert kept is not None
    body = summary.report(kept, make_parts())
    assert body["wire"] == {"update": "int8", "adapter": "int8"}
    assert all(set(r["bytes_up"]) == {"a", "b"} for r in body["rounds"])


class Restarted(FakeSite):
    """Forgets the plan once, before its second round, as a site that was started again."""

    def train(self, digest: str, round_: int, adapter: Any, receipt: str) -> Update:
        made = super().train(digest, round_, adapter, receipt)
        self.known = self.known and len(self.calls) != 1
        return made


def test_a_frozen_factor_is_sent_once_and_counted(trial: Any):
    """To a site that was started again, once more."""
    frozen = {"layer.A": np.zeros((100, 1000), np.float32)}
    run = trial(FakeSite("a"), Restarted("b"))

    def started(asked: Study) -> Any:
        return SimpleNamespace(study=asked, adapter=start(), frozen=frozen, strategy={})

    study = make_study(wire="int8", min_sites=2)
    text = PublicTable.model_validate(
        {"path": Path("x.jsonl"), "columns": {"text": "t"}, "licence": "CC0-1.0"}
    )
    lora = study.lora.model_copy(update={"a_init": "public", "rank": 100})
    study = study.model_copy(update={"lora": lora, "public": text})
    body = run.run(study, parts=make_parts(start=started))
    down = {name: [entry["bytes_down"][name] for entry in body["rounds"]] for name in "ab"}
    sent = {name: [count // frozen["layer.A"].nbytes for count in down[name]] for name in "ab"}
    assert sent == {"a": [1, 0, 0, 0], "b": [1, 1, 0, 0]}
    assert [site.prepared for site in run.sites] == [1, 2]
