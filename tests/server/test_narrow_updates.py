"""Sites of other ranks at the coordinator: what they declare, what is taken in and reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import LoraTable, Study
from fedtune.core.errors import Refused
from fedtune.core.models.rank_slice import ALL, rank_slice
from fedtune.core.vault.prepared import Admission, Update
from fedtune.core.wire.codec import Shapes, decode, encode
from fedtune.observe.log import cleaned
from fedtune.report.markdown import markdown
from fedtune.server.bound import norm_bound, terms
from fedtune.server.rank_slices import pad_update, slice_update
from tests.plugins import install
from tests.server.fakes import FakeSite, make_parts, make_study

B, HEAD = "layer.lora_B.default.weight", "head.weight"
SHAPES = {B: (3, 8), HEAD: (2, 5)}
LORA = LoraTable(rank=8, min_rank=2)


class Ranked(FakeSite):
    """Trains `rank` columns, in turn; says that it trains `says`, unless that is None."""

    def __init__(self, name: str, rank: int, says: Any = "the same", **more: Any) -> None:
        super().__init__(name, **more)
        self.rank, self.says = rank, rank if says == "the same" else says
        self.sent: list[dict[str, np.ndarray]] = []

    def prepare(self, study: Study, frozen: dict[str, np.ndarray], coordinator: str) -> Admission:
        said = super().prepare(study, frozen, coordinator)
        return Admission(said.admitted, said.reason, said.name, said.declared_size, self.says)

    def train(
        self, digest: str, round_: int, adapter: dict[str, np.ndarray], receipt: str
    ) -> Update:
        made = super().train(digest, round_, adapter, receipt)
        self.sent.append(
            slice_update(decode(made.delta, SHAPES), rank_slice(LORA, self.rank, round_))
        )
        return Update(encode(self.sent[-1], self.encoding), made.events)

    def shapes(self, digest: str) -> Shapes:
        return SHAPES


def study(least: int | None = 2, **strategy: Any) -> Study:
    made = make_study(**{"min_sites": 1} | strategy)
    return made.model_copy(update={"lora": LORA.model_copy(update={"min_rank": least})})


def zeros() -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def parts(**changes: Any) -> Any:
    begun = lambda asked: SimpleNamespace(  # noqa: E731
        study=asked, adapter=zeros(), frozen={}, strategy={}
    )
    return make_parts(start=begun, **changes)


@pytest.mark.parametrize("weights", ["equal", "declared"])
def test_the_aggregate_is_the_mean_with_zeros_for_what_a_site_does_not_train(trial, weights):
    sites = [Ranked("a", 8, size=100), Ranked("b", 4, size=200), Ranked("c", 2, size=300)]
    run = trial(*sites)
    run.run(study(weights=weights), parts=parts())
    share = {"a": 1, "b": 2, "c": 3} if weights == "declared" else dict.fromkeys("abc", 1)
    total, wrong = zeros(), zeros()
    for round_ in range(4):
        for name, shape in SHAPES.items():
            count = np.zeros(shape)
            mean = np.zeros(shape)
            for site in sites:
                columns = rank_slice(LORA, site.rank, round_ + 1) if name == B else ALL
                mean[:, columns] += share[site.name] * site.sent[round_][name]
                count[:, columns] += share[site.name]
            total[name] += mean / sum(share.values())
            wrong[name] += mean / count
    for name, array in run.adapter().items():
        np.testing.assert_allclose(array, total[name], atol=1e-6)
    # The twin: the mean over those who train a column is another number.
    assert np.abs(run.adapter()[B] - wrong[B]).max() > 0.1
    np.testing.assert_allclose(wrong[HEAD], total[HEAD], atol=1e-6)  # everybody trains the head


@pytest.mark.parametrize("says", [None, 0, 1, 9, -2, True, "4", 4.0])
def test_a_rank_that_the_plan_does_not_allow_is_refused(trial, says, monkeypatch):
    good, strange = Ranked("good", 8), Ranked("strange", 8, says=says)
    body = trial(good, strange).run(study(), parts=parts())
    missing = body["rounds"][0]["missing"]["strange"]
    assert missing == "refused: its lora_rank is not one that the plan allows"
    assert strange.calls == []


@pytest.mark.parametrize(("declared", "trained"), [(2, 8), (2, 4), (4, 2), (8, 2)])
def test_an_update_of_another_rank_than_declared_is_dropped(trial, declared, trained):
    run = trial(Ranked("good", 8), Ranked("bad", trained, says=declared))
    body = run.run(study(), parts=parts())
    for entry in body["rounds"]:
        assert entry["participants"] == ["good"]
        assert "has another shape than agreed" in entry["missing"]["bad"]


def test_without_min_rank_nobody_has_a_choice(trial):
    """And what a site says of its rank is not heard."""
    run = trial(Ranked("good", 8, says=None), Ranked("bad", 4, says=4))
    body = run.run(study(None), parts=parts())
    assert "another shape" in body["rounds"][0]["missing"]["bad"]
    assert "lora_ranks" not in body
    assert all("lora_ranks" not in line for _, line in run.events if "round" in line)


def test_a_rank_stays_for_the_study_also_over_a_restart_of_the_coordinator(trial):
    sites = [Ranked("a", 8), Ranked("b", 4, script={2: KeyboardInterrupt()}), Ranked("c", 2)]
    run = trial(*sites)
    with pytest.raises(KeyboardInterrupt):
        run.run(study(), parts=parts())
    sites[2].rank = sites[2].says = 4
    body = run.run(study(), resume=True, parts=parts())
    assert (
        body["rounds"][-1]["missing"].get("c") == "refused: its lora_rank changed during the study"
    )
    assert body["rounds"][-1]["participants"] == ["a", "b"]
    assert body["lora_ranks"]["sites"] == {"a": 8, "b": 4, "c": 2}


def test_an_update_longer_than_its_own_numbers_allow_is_dropped(trial, monkeypatch):
    """The bound follows from how many numbers the site trains, not from how many there are."""
    plan = study()
    both = []
    for rank in (2, 8):
        size = sum(a.size for a in slice_update(zeros(), rank_slice(LORA, rank, 1)).values())
        site = terms(plan, parts().budget(plan, 100), 100)
        both.append(norm_bound(plan, site, size, 0.0))
    assert both[0] < both[1]
    between = sum(both) / 2

    def stretched(site: Ranked) -> Any:
        honest = site.train

        def train(*order: Any) -> Update:
            made = honest(*order)
            norm = np.sqrt(sum(float(np.square(a).sum()) for a in made.delta.values()))
            return Update(
                {n: a * np.float32(between / norm) for n, a in made.delta.items()}, made.events
            )

        return train

    sites = [Ranked("all", 8), Ranked("few", 2)]
    for site in sites:
        monkeypatch.setattr(site, "train", stretched(site))
    body = trial(*sites).run(plan, parts=parts())
    assert body["rounds"][0]["participants"] == ["all"]
    assert "its update is longer" in body["rounds"][0]["missing"]["few"]


def test_the_report_says_who_trained_what_and_how_noisy_it_is(trial):
    run = trial(Ranked("a", 8), Ranked("b", 4), Ranked("c", 2))
    body = run.run(study(), parts=parts())
    (band,) = body["lora_ranks"]["columns"]
    # Over four rounds every column is a's four times, b's twice and c's once, of twelve.
    assert (band["first"], band["last"]) == (1, 8)
    assert band["share"] == pytest.approx(7 / 12)
    assert band["noise"] == pytest.approx((7 / 12) ** 0.5)
    rounds = [cleaned(kind, data, strict=True) for kind, data in run.events if kind == "round"]
    assert [line["lora_ranks"] for line in rounds] == [{"a": 8, "b": 4, "c": 2}] * 4
    text = markdown(body)
    assert "## Ranks by site" in text and "in turn: a 8, b 4, c 2." in text
    assert "| 1–8 | 0.5833 | 0.7638 | 1.309 |" in text


MEAN = """
from dataclasses import dataclass
from fedtune.core.strategy import Strategy
from fedtune.strategies.fedavg import FedAvg

@dataclass
class Mean(FedAvg):
    pass
"""


@pytest.mark.parametrize(
    ("strategy", "known"), [("fedavg", True), ("plugged", True), ("fedadam", False)]
)
def test_the_noise_is_known_of_every_strategy_that_takes_the_mean(
    trial, tmp_path, monkeypatch, strategy, known
):
    points = {"fedtune.strategies": {"plugged": "plugged_mean:Mean"}}
    install(tmp_path / "installed", monkeypatch, "plugged_mean", MEAN, points)
    body = trial(Ranked("a", 8), Ranked("b", 4)).run(study(name=strategy), parts=parts())
    (band,) = body["lora_ranks"]["columns"]
    assert band["noise"] == (pytest.approx(0.75**0.5) if known else None)


def test_ranks_that_nobody_got_to_are_told(trial):
    """Blocks of three in eight: 1–3, 4–6, 6–8; and again 1–3 in the fourth round."""
    body = trial(Ranked("a", 3), Ranked("b", 3)).run(study(), parts=parts())
    found = [(b["first"], b["last"], b["share"]) for b in body["lora_ranks"]["columns"]]
    assert found == [(1, 3, 0.5), (4, 5, 0.25), (6, 6, 0.5), (7, 8, 0.25)]
    few = study().model_copy(update={"training": study().training.model_copy(update={"rounds": 1})})
    body = trial(Ranked("a", 2), Ranked("b", 2), folder="few").run(few, parts=parts())
    found = [(b["first"], b["last"], b["share"]) for b in body["lora_ranks"]["columns"]]
    assert found == [(1, 2, 1.0), (3, 8, 0.0)]
    assert "| 3–8 | 0 | 0 | – |" in markdown(body)


@pytest.mark.parametrize(("rank", "of"), [(1, 1), (1, 5), (2, 8), (3, 8), (5, 8), (8, 8), (7, 64)])
def test_in_turn_a_site_trains_every_column(rank, of):
    lora = LoraTable(rank=of, min_rank=1)
    blocks = -(-of // rank)
    found = [range(of)[rank_slice(lora, rank, round_)] for round_ in range(1, 3 * blocks + 1)]
    assert all(len(block) == rank for block in found)
    assert {column for block in found[:blocks] for column in block} == set(range(of))
    assert found[:blocks] == found[blocks : 2 * blocks] == found[2 * blocks :]
    assert rank_slice(lora, None, 5) == rank_slice(None, 3, 5) == ALL


def test_where_every_site_trains_all_the_report_is_as_ever(trial):
    body = trial(Ranked("a", 8), Ranked("b", 8)).run(study(), parts=parts())
    assert "lora_ranks" not in body and "Ranks by site" not in markdown(body)


def test_when_none_is_allowed_the_study_ends_refused(trial):
    with pytest.raises(Refused, match="lora_rank"):
        trial(Ranked("a", 1), Ranked("b", 1)).run(study(), parts=parts())


def test_widening_undoes_narrowing_but_for_the_columns_that_are_out():
    draw, columns = np.random.default_rng(0), slice(2, 5)
    whole = {n: draw.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    again = pad_update(slice_update(whole, columns), whole, columns)
    np.testing.assert_array_equal(again[B][:, columns], whole[B][:, columns])
    assert not again[B][:, :2].any() and not again[B][:, 5:].any()
    np.testing.assert_array_equal(again[HEAD], whole[HEAD])
    np.testing.assert_array_equal(pad_update(slice_update(whole, ALL), whole, ALL)[B], whole[B])
