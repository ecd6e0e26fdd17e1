"""The state machine over real Flower messages: who is asked, what is taken, what is written."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import DataError, InfrastructureError
from fedtune.core.vault.prepared import Update
from fedtune.core.wire.keys import SigningKey
from fedtune.report.markdown import markdown
from fedtune.server.admission import plan_message
from fedtune.server.exchange import size
from tests.server.fakes import SHAPES, FakeSite, make_parts, make_study, update_of
from tests.server.rounds_kit import metrics, one_round, three


def test_a_run_writes_everything_and_says_what_happened(trial):
    run = trial(*three())
    reports = []
    body = run.run(parts=make_parts(report=lambda out, b: reports.append(b)))
    assert reports == [body]
    kinds = [kind for kind, _ in run.events if kind != "site"]
    assert kinds == ["start", "planned", *["begin", "round"] * 4, "done"]
    (planned,) = (data for kind, data in run.events if kind == "planned")
    assert planned["participants"] == ["a", "b", "c"] == list(planned["planned"])
    assert sorted(p.name for p in (run.folder / "out").iterdir()) == [
        "adapter", "checkpoint", "evidence.json", "metrics.jsonl", "plan.json",
        "signature.json",
    ]  # fmt: skip
    assert [line["round"] for line in metrics(run)] == [1, 2, 3, 4]
    assert body["privacy"]["steps"] == 4 and body["privacy"]["sites"].keys() == {"a", "b", "c"}
    assert body["privacy"]["epsilon"] == pytest.approx(0.25 * 4 / 1.5)
    assert body["quality"]["before"] == {"loss": 9.0}
    assert [q["round"] for q in body["quality"]["by_round"]] == [2, 4]  # evaluation.every = 2
    assert body["sites"] == {"a": "admitted", "b": "admitted", "c": "admitted"}
    json.dumps(body)


def test_the_aggregate_is_the_mean_of_the_updates(trial):
    sites = three()
    run = trial(*sites)
    run.run(make_study(min_sites=2).model_copy(update={"training": one_round()}))
    deltas = [update_of(s.name) for s in sites]
    for name in SHAPES:
        mean = np.mean([d[name] for d in deltas], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(run.adapter()[name], mean.astype(np.float32))


def test_declared_sizes_weigh_when_the_study_says_so(trial):
    sites = [FakeSite("a", size=300), FakeSite("b", size=100)]
    run = trial(*sites)
    study = make_study(weights="declared").model_copy(update={"training": one_round()})
    run.run(study)
    a, b = (update_of(n)["layer.C"] for n in "ab")
    np.testing.assert_allclose(run.adapter()["layer.C"], 0.75 * a + 0.25 * b, rtol=1e-6)


def public(**strategy: Any) -> Any:
    """Without noise: with it, who declares more may also send less (fedtune/server/bound.py)."""
    return make_study(**strategy).model_copy(update={"privacy": "off"})


def test_one_declared_size_outweighs_nobody(trial):
    """A size is a claim: one of 10^10 counts for four times the median, and everybody is told."""
    sizes = {"a": 50, "b": 100, "c": 10**10}
    run = trial(*[FakeSite(name, size=size) for name, size in sizes.items()])
    study = public(weights="declared").model_copy(update={"training": one_round()})
    body = run.run(study)
    a, b, c = (update_of(n)["layer.C"] for n in "abc")
    np.testing.assert_allclose(
        run.adapter()["layer.C"], (50 * a + 100 * b + 400 * c) / 550, rtol=1e-5, atol=1e-7
    )
    said = "counts as 400 of 10000000000 declared: no more than a multiple of the median"
    assert body.get("weights") == {"c": said}
    assert said in markdown(body)
    assert metrics(run)[0]["weights"] == {"c": 400}
    (told,) = [d for kind, d in run.events if kind == "site" and d["reason"]]
    assert (told["name"], told["status"], told["reason"]) == ("c", "trained", said)


def test_two_sites_do_not_make_a_median_of_the_larger(trial):
    run = trial(FakeSite("a", size=100), FakeSite("b", size=10**10))
    run.run(public(weights="declared"))
    assert [entry.get("weights") for entry in metrics(run)] == [{"b": 400}] * 4
    assert sum(bool(d["reason"]) for kind, d in run.events if kind == "site") == 1


@pytest.mark.parametrize("weights", ["declared", "equal"])
def test_a_size_within_four_medians_counts_whole(trial, weights):
    run = trial(FakeSite("a", size=100), FakeSite("b", size=400))
    body = run.run(make_study(weights=weights))
    assert "weights" not in body and not any("weights" in entry for entry in metrics(run))


def test_a_share_of_sites_is_drawn_from_the_public_seed_alone(trial):
    study = make_study(min_sites=1, fraction=0.5)
    first = trial(*[FakeSite(n) for n in "abcdef"], folder="one")
    first.run(study)
    second = trial(*[FakeSite(n) for n in "fedcba"], folder="two")  # other nodes, same names
    second.run(study)
    asked = [line["participants"] for line in metrics(first)]
    assert asked == [line["participants"] for line in metrics(second)]
    assert all(len(names) == 3 for names in asked) and len({tuple(n) for n in asked}) > 1
    other = trial(*[FakeSite(n) for n in "abcdef"], folder="three")
    other.run(study.model_copy(update={"study": study.study.model_copy(update={"seed": 8})}))
    assert asked != [line["participants"] for line in metrics(other)]


def test_a_site_that_comes_late_joins_from_then_on(trial):
    run = trial(*three())
    grid = run.grid()
    everyone = grid.get_node_ids()
    grid.get_node_ids = lambda: everyone[:2] if len(run.events) < 10 else everyone
    run.run(grid=grid)
    took_part = [line["participants"] for line in metrics(run)]
    assert took_part[0] == ["a", "b"] and took_part[-1] == ["a", "b", "c"]


def test_a_site_that_vanishes_is_missing_with_a_reason(trial):
    run = trial(*three())
    grid = run.grid()
    everyone = grid.get_node_ids()
    gone = lambda: any(kind == "round" for kind, _ in run.events)  # noqa: E731
    grid.get_node_ids = lambda: everyone[:2] if gone() else everyone
    run.run(grid=grid)
    assert metrics(run)[1]["missing"] == {"c": "failed: the site is not connected"}


def test_two_nodes_cannot_share_a_name(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    sites = run.sites
    sites.append(FakeSite("c"))
    sites[2].prepare = sites[0].prepare  # says that it is called a
    import fedtune.core.vault.answers
    import fedtune.launch.in_one_process

    by_path = {s.name: s for s in sites}
    fedtune.core.vault.answers.worker = lambda path: by_path[path]
    run.run()
    assert metrics(run)[0]["missing"] == {"c": "refused: a is another node's name"}


def test_updates_are_aggregated_as_they_arrive(trial, monkeypatch):
    """A site is asked only after the one before it has been taken in: no reply is held."""
    from fedtune.strategies.fedavg import FedAvg

    log: list[str] = []
    run = trial(*three())
    for site in run.sites:
        honest = site.train
        site.train = lambda *a, s=site, h=honest: log.append(f"train {s.name}") or h(*a)
    add = FedAvg.add
    monkeypatch.setattr(FedAvg, "add", lambda *a: log.append("add") or add(*a))
    run.run()
    assert sorted(log[0:6:2]) == ["train a", "train b", "train c"]
    assert log[1::2] == ["add"] * 12


def test_bytes_are_those_of_the_contents_and_agree_with_the_wire(trial):
    run = trial(*three())
    grid = run.grid()
    run.run(grid=grid)
    down = sum(sum(line["bytes_down"].values()) for line in metrics(run))
    up = sum(sum(line["bytes_up"].values()) for line in metrics(run))
    messages = 3 * 6  # three sites, one plan, four rounds, and that it has ended
    ended = 3 * size(plan_message(make_study(), {}, SigningKey()))  # in no round's bytes
    for counted, sent in ((down, grid.bytes_down.total()), (up, grid.bytes_up.total())):
        assert counted < sent < counted + ended + 200 * messages  # the rest is Flower's metadata
    assert run.events[-2][1]["bytes"] == sum(
        sum(metrics(run)[-1][key].values()) for key in ("bytes_up", "bytes_down")
    )


def test_the_plan_on_the_wire_holds_no_path_of_the_coordinator(trial):
    study = make_study()
    text = str(plan_message(study, {}, SigningKey())["plan"]["study"])
    assert "/secret" not in text and "held-out.jsonl" in text
    assert size(plan_message(study, {}, SigningKey())) > len(text)


def test_a_failing_site_is_missing_and_its_words_stay_at_home(trial, caplog):
    secret = "Mrs Example, born 1.1.1950"
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script={2: RuntimeError(secret)}))
    body = run.run()
    assert body["rounds"][1]["missing"] == {"c": "failed: the site's own log says why"}
    assert body["rounds"][2]["missing"] == {}
    everything = json.dumps(body) + json.dumps(run.events) + caplog.text
    everything += "".join(
        p.read_bytes().decode("latin1") for p in run.folder.rglob("*") if p.is_file()
    )
    assert secret not in everything and "Example" not in everything


def test_a_site_that_cannot_prepare_fails_by_class_alone(trial):
    error = DataError("row 7 of /home/ward/notes.csv is broken")
    run = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", prepare_error=error))
    body = run.run()
    assert body["rounds"][0]["missing"] == {"c": "failed: the site's own log says why"}
    assert "ward" not in json.dumps(run.events)


def test_too_few_replies_are_retried_and_nobody_trains_twice(trial):
    sites = [FakeSite("a"), FakeSite("b", script={1: OSError(), 2: OSError()})]
    run = trial(*sites)
    body = run.run()
    assert [entry["late"] for entry in body["rounds"]] == [
        {"b": "failed: the site's own log says why"},
        {},
        {},
        {},
    ]
    assert body["rounds"][0]["missing"] == {}
    assert sites[0].calls == [1, 2, 3, 4]  # its first update was kept over the retries
    assert sites[1].calls == [1, 1, 1, 2, 3, 4]


def test_a_round_without_enough_replies_is_never_a_success(trial):
    broken = {n: OSError() for n in range(2, 9)}
    run = trial(FakeSite("a"), FakeSite("b", script=broken))
    with pytest.raises(
        InfrastructureError, match=r"round 2: 1 sites delivered .*b: failed: the site's own log"
    ):
        run.run()
    assert len(metrics(run)) == 1
    assert run.sites[1].calls == [1, 2, 2, 2, 2]  # the round and three retries


def test_a_round_with_no_reply_at_all_is_retried(trial):
    run = trial(FakeSite("a", script={1: OSError()}))
    assert len(run.run(make_study())["rounds"]) == 4
    assert run.sites[0].calls == [1, 1, 2, 3, 4]


def test_a_site_that_lost_the_plan_gets_it_again(trial):
    run = trial(FakeSite("a"), FakeSite("b"))
    forget = run.sites[1]

    def lose(update: Update) -> Update:
        forget.known = False
        return update

    forget.script = {2: lose}
    run.run()
    assert forget.prepared == 2 and forget.calls == [1, 2, 3, 4]
    assert all(line["participants"] == ["a", "b"] for line in metrics(run))
