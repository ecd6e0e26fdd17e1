"""Plans and policies where sites train fewer ranks than the plan's. (The self-test at a site's own
rank is in test_lora_ranks.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import LoraTable, Study, load_site, load_study
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.rank_slice import ALL, rank_slice, trained_slice
from fedtune.core.strategy import build_strategy as strategy_of
from fedtune.core.vault.policy import refusals
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.codec import layout, shapes
from fedtune.officer.review import review
from fedtune.public.start import start
from fedtune.server.rank_slices import slice_update
from tests.client.test_site import make_site, notes
from tests.dp.conftest import study
from tests.lora_ranks_kit import LORA, lay_out

pytestmark = pytest.mark.usefixtures("no_worker_is_left", "without_self_test")


def plan_of(base: Path, **lora: object) -> Study:
    return study(base={"model": str(base), "dtype": "float32"}, lora=LORA | lora)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"min_rank": 9}, "at most rank"),
        ({"train": "AB"}, "mean of the sites' B·A is not the product"),
    ],
)
def test_a_plan_that_cannot_be_exact_is_no_plan(lora: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LoraTable.model_validate(LORA | lora, strict=False)


def test_the_study_file_names_the_key(tmp_path: Path, tiny_base: Path) -> None:
    plan = lay_out(tmp_path, tiny_base)
    plan.write_text(plan.read_text().replace("min_rank = 2", 'min_rank = 2\ntrain = "AB"'))
    with pytest.raises(ConfigError, match=r"study.toml: lora: min_rank: .*train = \"B\""):
        load_study(plan)


def test_a_trimmed_mean_takes_no_mixed_ranks(tiny_base: Path) -> None:
    plan = plan_of(tiny_base)
    trimmed = plan.model_copy(
        update={
            "strategy": plan.strategy.model_copy(
                update={"name": "trimmed_mean", "weights": "equal"}
            )
        }
    )
    with pytest.raises(ConfigError, match=r"trimmed_mean cannot use lora\.min_rank"):
        strategy_of(trimmed)


def test_plans_without_min_rank_are_what_they_were(tiny_base: Path) -> None:
    """Their digest, and what an older release reads, know no such key."""
    assert "min_rank" not in plan_of(tiny_base, min_rank=None).model_dump_json()
    assert plan_of(tiny_base).digest != plan_of(tiny_base, min_rank=None).digest


@pytest.mark.parametrize(
    ("most", "lora", "says"),
    [
        (None, {"min_rank": None}, ""),
        (8, {"min_rank": None}, ""),
        (64, {"min_rank": None}, ""),
        (2, {}, ""),
        (1, {}, "at least 2"),
        (4, {"min_rank": None}, "ask for lora.min_rank"),
        (4, {"min_rank": None, "train": "AB"}, 'ask for lora.train = "B"'),
    ],
)
def test_a_site_trains_fewer_ranks_only_where_the_plan_counts_on_it(
    tmp_path: Path, tiny_base: Path, most: int | None, lora: dict[str, object], says: str
) -> None:
    plan = plan_of(tiny_base, **lora, a_digest="sha256:" + "0" * 64)
    site = make_site(tmp_path)
    site = site.model_copy(update={"site": site.site.model_copy(update={"lora_rank": most})})
    found = [str(r) for r in refusals(plan, site, plan_for_site(plan, 12))]
    assert [says in words and "site.lora_rank" in words for words in found] == [True] * bool(says)


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """A site file with lora_rank = 3."""
    notes(tmp_path)
    path = tmp_path / "site.toml"
    path.write_text(
        f'[site]\nname = "a"\ndeclared_size = 12\nlora_rank = 3\nstate = "{tmp_path}/state"\n'
        '[data]\npath = "notes.jsonl"\n'
        'columns = { prompt = "note", completion = "answer", patient = "who" }\n'
        '[policy]\nbases = "any"\nmax_delta = 1e-4\n'
    )
    return path


def begun(base: Path, **lora: object) -> Any:
    made = plan_of(base, **lora)
    privacy = {"epsilon": 6.0, "delta": 1e-4, "unit": "patient"}
    return start(Study.model_validate(made.model_dump() | {"privacy": privacy}, strict=False))


def test_a_site_declares_its_rank_and_keeps_it_for_the_study(ranked: Path, tiny_base: Path) -> None:
    made = begun(tiny_base)
    worker = SiteWorker(load_site(ranked), ranked)
    assert worker.prepare(made.study, made.frozen).lora_rank == 3
    ranked.write_text(ranked.read_text().replace("lora_rank = 3", "lora_rank = 4"))
    assert worker.prepare(made.study, made.frozen).lora_rank == 3
    delta = worker.train(made.study.digest, 1, made.adapter).delta
    sent = {n: (a.dtype.name, a.shape) for n, a in delta.items()}
    first = rank_slice(made.study.lora, 3, 1)
    assert sent == layout(shapes(slice_update(made.adapter, first)), "int8")
    again = worker.train(made.study.digest, 1, made.adapter).delta
    assert all((again[n] == delta[n]).all() for n in delta)
    assert len(worker.log.steps()) == 1
    # Started again, it declares what the file now says, and cannot send the other update as such.
    other = SiteWorker(load_site(ranked), ranked)
    assert other.prepare(made.study, made.frozen).lora_rank == 4
    with pytest.raises(PolicyRefused, match=r"site\.lora_rank was changed .* set it back"):
        other.train(made.study.digest, 1, made.adapter)
    assert len(other.log.steps()) == 1, "it was neither trained nor paid for again"


def test_where_the_plan_leaves_no_choice_no_rank_is_said(ranked: Path, tiny_base: Path) -> None:
    made = begun(tiny_base, min_rank=None)
    worker = SiteWorker(load_site(ranked), ranked)
    said = worker.prepare(made.study, made.frozen)
    assert not said.admitted and "site.lora_rank" in said.reason and said.lora_rank is None
    ranked.write_text(ranked.read_text().replace("lora_rank = 3", "lora_rank = 64"))
    said = SiteWorker(load_site(ranked), ranked).prepare(made.study, made.frozen)
    assert said.admitted and said.lora_rank is None


def test_a_review_says_what_the_site_trains(ranked: Path, tiny_base: Path) -> None:
    site = load_site(ranked)
    found = review(begun(tiny_base).study, site, Ledger(site.site.state))
    words = " ".join(line for _, lines in found.sections for line in lines)
    assert "3 of its ranks each round here, in turn (site.lora_rank)" in words
    assert "how many ranks it trains" in words
    assert found.refusals == []


def test_what_a_site_trains_of_a_head_is_all_of_it() -> None:
    head = np.zeros((3, 8), np.float32)
    assert trained_slice("head.weight", head, slice(0, 2)) is head
    assert trained_slice("layer.lora_B.default.weight", head, slice(0, 2)).shape == (3, 2)
    assert trained_slice("layer.lora_B.default.weight", head, ALL).shape == head.shape
