"""The Ray engine without Ray: what it says then, and how its sites keep the plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.launch import ray
from fedtune.launch.simulate import simulate
from fedtune.server.admission import plan_message
from tests.secagg.world import lay_out
from tests.server.fakes import FakeSite, make_study, trial, zeros

__all__ = ["trial"]


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Python find every package but Ray."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )


def test_a_missing_ray_is_said_with_what_to_install(monkeypatch, tmp_path):
    without_ray(monkeypatch)
    with pytest.raises(InfrastructureError, match=r"pip install 'fedtune\[ray\]'"):
        ray.simulate_ray(make_study(), [tmp_path], tmp_path / "out")


def test_a_worker_that_does_not_know_the_plan_gets_it_from_the_sites_context(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    app = ray.site_app(["a", "b"])
    grid, study = InProcessGrid([Path("unused")], app), make_study()
    context = Context(1, 2, {"partition-id": 1}, RecordDict(), {})

    def ask(kind: str, content: RecordDict) -> RecordDict:
        message: Message = grid.create_message(content, kind, 2, "1")
        return app(message, context).content

    key = SigningKey()
    assert ask("query.prepare", plan_message(study, {}, key))["admission"]["name"] == "b"
    run.sites[1].known = False  # another Ray worker
    adapter = to_record(encode(zeros(), "float32"))
    beside = seal.digest_beside(bodies(adapter))
    order = ConfigRecord(seal.order(key, study.digest, 1, "nonce", "", beside=beside))
    reply = ask("train", RecordDict({"order": order, "adapter": adapter}))
    assert reply["site"]["status"] == "trained"
    assert run.sites[1].prepared == 2 and run.sites[0].prepared == 0


def test_a_draw_waits_in_one_worker_so_several_are_refused(tmp_path, tiny_base, monkeypatch):
    """Before anything is loaded: any other worker would answer that it has no such draw."""
    study, sites = lay_out(tmp_path, tiny_base)
    with pytest.raises(ConfigError, match="under Ray with 2 processes"):
        simulate(study, sites, tmp_path / "run", engine="ray", processes=2)
    assert not (tmp_path / "run").exists()
    without_ray(monkeypatch)
    with pytest.raises(InfrastructureError, match="ray engine is not installed"):
        simulate(study, sites, tmp_path / "run", engine="ray", processes=1)
