"""A staged change: what is released falls on new public records, and is replaced when better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.continuous import prepare
from fedtune.core.config import load_site, load_study
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.vault.prepared import Update
from fedtune.core.wire.codec import encode
from fedtune.report.change_plan import Look
from fedtune.server.versions import Index, Versions
from tests.continuous.fakes import Judge, alike, continuous, parts
from tests.server.fakes import FakeSite

CHANGE, END = 5, 12


class World:
    """What is right: the value that every number of the adapter ought to have."""

    right = 1.0


class Learner(FakeSite):
    """Moves half way to what is right, give or take its noise; with nobody left, noise alone."""

    alone = False

    def train(self, digest: str, round_: int, adapter: Any, receipt: str) -> Update:
        honest = super().train(digest, round_, adapter, receipt)
        rng = np.random.default_rng([round_, *self.name.encode()])
        delta = {
            name: (
                (0.0 if self.alone else 0.5) * (World.right - array)
                + rng.normal(0, 0.05, array.shape)
            ).astype(np.float32)
            for name, array in adapter.items()
        }
        return Update(encode(delta, self.encoding), honest.events)


class Public(Judge):
    """Loss: how far from right, on average."""

    def look(self, champion: Any, challenger: Any) -> Look:
        before, after = (
            float(np.mean([np.abs(a - World.right).mean() for a in each.values()]))
            for each in (champion, challenger)
        )
        return alike(before, after)


def play(trial: Any, monkeypatch: pytest.MonkeyPatch, arrive: bool) -> Index:
    monkeypatch.setattr(World, "right", 1.0)
    sites = [Learner("a"), Learner("b")]
    run = trial(*sites)

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "waiting" and len(sites[0].calls) == CHANGE:
            World.right = -1.0
            for site in sites:
                site.alone = not arrive

    made = parts(END, evaluator=lambda study, frozen: Public())
    run.run(continuous(), resume=True, parts=made, on_event=on_event)
    index = Versions(run.folder / "out").index()
    assert index is not None
    return index


def test_it_recovers_from_a_staged_change(trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = play(trial, monkeypatch, arrive=True)
    by = {version.number: version for version in index.versions}
    fallen, last = by[CHANGE + 1].champion_value, by[END]
    learned = min(v.value for v in index.versions[1 : CHANGE + 1] if v.value is not None)
    assert fallen is not None and last.champion_value is not None
    assert learned < 0.1 and fallen > 1.5  # drift shows as the champion's fall
    assert index.champion > CHANGE and min(last.value or 9.0, last.champion_value) < 0.1


def test_where_nobody_arrives_noise_alone_is_not_released(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin. Noise wanders, and what is released never gets worse for it."""
    index = play(trial, monkeypatch, arrive=False)
    values = [v.champion_value or 0.0 for v in index.versions if v.number > CHANGE]
    assert values == sorted(values, reverse=True) and values[-1] > 1.5


# --------------------------------------------------------------------------------- the example


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_example_changes_five_desks_for_new_patients_alone(tmp_path: Path) -> None:
    study = load_study(prepare.write(tmp_path, seed=3, patients=0.2))
    before, after = (rows(tmp_path / p / "evaluation.jsonl") for p in (".", "later"))
    assert [row["note"] for row in before] == [row["note"] for row in after]
    pairs = {(b["desk"], a["desk"]) for b, a in zip(before, after, strict=True)}
    assert len(pairs) == 9 and sum(b != a for b, a in pairs) == prepare.MOVED
    for site in sorted((tmp_path / "sites").iterdir()):
        here, later = rows(site / "notes.jsonl"), rows(tmp_path / "later" / f"{site.name}.jsonl")
        assert later[: len(here)] == here and len(later) == 2 * len(here)
        who = lambda some: {row["patient"] for row in some}  # noqa: E731
        assert not who(here) & who(later[len(here) :])
        plan = plan_for_site(study, load_site(site / "site.toml").site.declared_size)
        assert plan.rounds == prepare.LIFE and plan.epsilon <= prepare.EPSILON
    prepare.write(tmp_path / "again", seed=3, patients=0.2)
    for name in ("study.toml", "public.jsonl", "later/evaluation.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
