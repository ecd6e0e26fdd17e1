"""What a page says is what the files say, and of free text nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedtune.cli.main import app
from fedtune.core.errors import InputError
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import ANSWERS
from fedtune.dashboard.kinds import page_of
from fedtune.dashboard.server import app_of
from fedtune.observe import StatusFile
from fedtune.observe.home_status import HomeStatus
from fedtune.report.figures import format_short
from tests.cli_kit import SITE, tree
from tests.cli_kit import run as command

TOKEN = "t"
SECRET = "Zaphod-Beeblebrox-1979 was seen on ward 4"


def shown(path: Path, under: str = "") -> str:
    browser = TestClient(app_of(page_of(path), TOKEN), base_url="http://127.0.0.1")
    browser.get(f"/?token={TOKEN}")
    return browser.get(f"/{under}").text


def figures(page: str) -> dict[str, str]:
    return dict(re.findall(r'data-figure="([^"]+)">\s*([^<]*?)\s*<', page))


def test_a_path_is_what_it_holds(tried: Path, released: Path, tmp_path: Path) -> None:
    kinds = {
        tried / "runs" / "tried": "run",
        tried / "runs": "runs",
        tried / "north": "site",
        tried / "north" / "site.toml": "site",
        released: "release",
    }
    assert {path: page_of(path).kind for path in kinds} == kinds
    (tmp_path / "home" / "nodes").mkdir(parents=True)
    (tmp_path / "home" / "plan.json").write_text("{}")  # of a coordinator, as it is sent
    assert page_of(tmp_path / "home").kind == "coordinator"
    file = tmp_path / "home" / "plan.json"
    for path in (tmp_path, file, tmp_path / "none", tried / "evaluation.jsonl"):
        with pytest.raises(InputError):
            page_of(path)


def test_the_figures_of_a_run_are_its_reports(tried: Path) -> None:
    run = tried / "runs" / "tried"
    report = json.loads((run / "report.json").read_text())
    found, metric = figures(shown(run)), report["quality"]["metric"]
    assert found["epsilon"] == rounded_up(report["privacy"]["epsilon"])
    assert found["before"] == format_short(report["quality"]["before"][metric])
    assert found["after"] == format_short(report["quality"]["after"][metric])
    assert found["round"] == str(len(report["rounds"]))
    for name, site in report["privacy"]["sites"].items():
        assert found[f"epsilon-{name}"] == rounded_up(site["epsilon"])
    of_runs = figures(shown(tried / "runs"))
    assert of_runs["epsilon-tried"] == found["epsilon"] and of_runs["after-tried"] == found["after"]


def test_the_curves_are_the_metrics_to_the_last_bit(tried: Path) -> None:
    run = tried / "runs" / "tried"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    series = json.loads(shown(run, "series"))
    assert series["rounds"] == [row["round"] for row in rows]
    for name, values in series["quality"].items():
        assert values == [row["quality"].get(name) for row in rows]
    for name, values in series["epsilon"].items():
        assert values == [row["epsilon"][name] for row in rows]


def planted(tried: Path, tmp_path: Path) -> Path:
    """A copy in which every field of every file says the secret, where a file can hold it."""
    copy = shutil.copytree(tried, tmp_path / "copy")
    run, state = copy / "runs" / "tried", copy / "north" / "state"
    for path in (run / "status.json", state / "status.json"):
        status = json.loads(path.read_text()) if path.exists() else {}
        if status:
            status["reason"] = SECRET
            status["sites"]["north"]["reason"] = SECRET
            status["last"].append({"event": "site", "reason": f"policy.max_epsilon {SECRET}"})
            path.write_text(json.dumps(status))
    report = json.loads((run / "report.json").read_text())
    report["sites"]["north"] = report["quality"]["on"] = SECRET
    report["absences"] = {"north": {"rounds": 1, "reasons": {SECRET: 1}}}
    report["quality"]["examples"] = [SECRET]
    report["quality"]["after"][SECRET] = 1.0
    (run / "report.json").write_text(json.dumps(report))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["missing"] = {"south": SECRET}
    rows[-1]["quality"][SECRET] = 1.0
    rows[-1]["text"] = SECRET
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = json.loads((state / "counts.json").read_text())
    (facts,) = counts.values()
    facts["rejected"] = {SECRET: 3}
    facts["study"] = facts["unit"] = facts["time"] = facts["note"] = SECRET
    counts[SECRET] = facts
    (state / "counts.json").write_text(json.dumps(counts))
    return copy


def test_free_text_in_any_file_is_on_no_page(tried: Path, tmp_path: Path) -> None:
    """Twin: the same files, shown with the filter of reasons broken, say it."""
    copy = planted(tried, tmp_path)
    for path in (copy / "runs" / "tried", copy / "runs", copy / "north" / "site.toml"):
        page = shown(path)
        assert SECRET not in page and "Zaphod" not in page, path
    for part in ("series", "live/rounds"):
        assert "Zaphod" not in shown(copy / "runs" / "tried", part)
    assert "3 for another reason" in shown(copy / "north" / "site.toml")


def test_the_twin_says_it(tried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.observe.log import FIELDS

    copy = planted(tried, tmp_path)
    monkeypatch.setitem(FIELDS, "missing", lambda value: value)
    assert SECRET in shown(copy / "runs" / "tried", "live/rounds")


def test_every_row_of_a_site_is_trained_on_or_in_one_of_the_columns_beside(
    tried: Path, tmp_path: Path
) -> None:
    """Twin: without the patients who withdrew they do not add up."""
    copy = shutil.copytree(tried, tmp_path / "copy")
    site, state = copy / "north" / "site.toml", copy / "north" / "state"
    (facts,) = json.loads((state / "counts.json").read_text()).values()
    facts |= {"rows": facts["train"] + 15, "withheld": 2, "filtered": 3, "over_cap": 1}
    facts |= {"excluded": 4, "rejected": {"missing value": 5}}
    (state / "counts.json").write_text(json.dumps({"north": facts}))
    found = figures(shown(site))
    parts = ("train", "filtered", "withheld", "excluded", "over_cap")
    total = sum(int(found[part]) for part in parts) + 5
    assert total == int(found["rows"]) and total - int(found["excluded"]) != int(found["rows"])
    assert "5 missing value" in shown(site)


def test_a_simulation_and_public_text_alone_are_on_a_runs_page(tried: Path, tmp_path: Path) -> None:
    """Twin: a consortium's run that was not started from public text."""
    run = shutil.copytree(tried / "runs" / "tried", tmp_path / "run")
    report = json.loads((run / "report.json").read_text())
    metric, quality = report["quality"]["metric"], report["quality"]
    quality |= {"start": {metric: 0.25}}
    quality["gain"] = {**quality.get("gain", {}), "records": 60, "over_start": [-0.5, 0.25]}
    (run / "report.json").write_text(json.dumps(report | {"invented": True}))
    page = shown(run)
    assert "a simulation" in page and "invented records" in page
    assert "what public text alone gives (0.25, for no ε)" in page
    assert json.loads(shown(run, "series"))["start"] == {metric: 0.25}
    del report["simulation"], quality["start"]
    (run / "report.json").write_text(json.dumps(report))
    page = shown(run)
    assert "a simulation" not in page and "public text alone gives" not in page


def test_a_site_that_waits_for_a_person_is_named_at_the_coordinator(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "run")
    status("start", {"study": "gait", "done": 0, "rounds": 4, "private": True})
    rule = 'policy.admission = "reviewed" and nobody at the site has signed this plan'
    status("site", {"name": "south", "status": "waiting", "reason": rule, "round": 1})
    page = shown(tmp_path / "run")
    assert "south waits for a person there to sign the plan" in page
    assert "waiting for people at south to sign the plan" in page
    status("site", {"name": "south", "status": "admitted", "reason": "", "round": 1})
    assert "to sign the plan" not in shown(tmp_path / "run")
    status.close()


def test_a_coordinator_lists_its_studies_with_round_and_epsilon(tmp_path: Path) -> None:
    home, plan = tmp_path / "coordinator", "sha256:" + "ab" * 32
    (home / "nodes").mkdir(parents=True)
    status = HomeStatus(home)
    run, row = StatusFile(tmp_path / "runs" / "gait"), status.study("gait", "2031-05-04T09:30:00Z")
    other = status.study("ward")
    status("listening", {"address": "hub.example:8443", "participants": ["north"]})
    assert "Studies" in shown(home) and "queued" in shown(home)
    start = {"study": "gait", "plan_digest": plan, "done": 0, "rounds": 4, "private": True}
    done = {"round": 2, "rounds": 4, "participants": ["north"], "epsilon": {"north": 1.25}}
    for sink in (run, row):
        sink("start", start)
        sink("round", done)
    other("site", {"name": "east", "status": "refused", "reason": "policy.max_epsilon: 8"})
    other("stopped", {"error": "Refused"})
    page = shown(home)
    assert '<a href="runs/gait/">gait</a>' in page and '<td class="n">2 / 4</td>' in page
    assert 'data-figure="epsilon-gait">1.25<' in page and "2031-05-04 09:30:00 UTC" in page
    assert "stopped</span> Refused, east: policy.max_epsilon" in page
    for each in (status, run):
        each.close()


def test_a_site_whose_answer_waits_is_named_at_both_ends(tmp_path: Path) -> None:
    rule = 'policy.answers = "held" and nobody at the site has let this answer go'
    status = StatusFile(tmp_path / "run")
    status("start", {"study": "gait", "done": 0, "rounds": 4, "private": True})
    status("site", {"name": "south", "status": "waiting", "reason": rule, "round": 1})
    page = shown(tmp_path / "run")
    assert "south waits for a person there to let an answer go" in page
    assert "waiting for people at south to let an answer go" in page
    status.close()
    (tmp_path / "site.toml").write_text(SITE.format(name="north", most=8.0, off="false"))
    told = StatusFile(tmp_path / "state", role="site")
    answered = {"site": "north", "status": "waiting", "reason": rule, "round": 1, "kind": "train"}
    told("answered", answered)
    assert "until a person here lets it go: fedtune let-go" in shown(tmp_path / "site.toml")
    line = "an answer waits until a person here lets it go: fedtune let-go"
    assert line in command("status", tmp_path / "site.toml").output.replace("\n", " ")
    told("answered", {**answered, "status": "trained", "reason": ""})
    assert "let-go" not in shown(tmp_path / "site.toml")
    told.close()


def test_what_is_the_matter_is_said_first(tmp_path: Path) -> None:
    status = StatusFile(tmp_path / "run")
    status("start", {"study": "gait", "done": 0, "rounds": 4, "private": True})
    refused = {"name": "north", "status": "refused", "round": 1}
    status("site", {**refused, "reason": "policy.max_epsilon: no room"})
    status("site", {"name": "south", "status": "refused", "reason": "policy.admission", "round": 1})
    status.close()  # as if killed
    page = shown(tmp_path / "run")
    assert "north is out of budget (policy.max_epsilon)" in page
    assert "south refused the plan (policy.admission)" in page
    assert "Killed: its process is no more" in page
    assert page.index("Killed") < page.index("Taking part")


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    run = tmp_path / "<script>alert(1)</script>"
    status = StatusFile(run)
    status("start", {"done": 0, "rounds": 4})
    status.close()
    assert "<script>alert" not in shown(run) and "&lt;script&gt;" in shown(run)


def lines_of(page: Any) -> list[str]:
    return [command["line"] for command in page.read_context()["commands"]]


def test_every_line_to_copy_is_a_command(tried: Path, released: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "nodes").mkdir(parents=True)
    paths = (tried / "runs" / "tried", tried / "north", released, tmp_path / "home")
    lines = [line for path in paths for line in lines_of(page_of(path))]
    assert len(lines) >= 10
    for line in lines:
        name, *words = shlex.split(line)[1:]
        assert shlex.split(line)[0] == "fedtune"
        command = tree(app).commands[name]  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


def answered(tried: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the run with answers of base and adapter, as `fedtune answers` keeps them."""
    run = shutil.copytree(tried / "runs" / "tried", tmp_path / "answered")
    base, adapter = {"answer": "no", "probability": 0.25}, {"answer": "yes", "probability": 0.9994}
    row = {"row": 1, "prompt": "Does it hurt?", "expected": "yes", "base": base, "adapter": adapter}
    found = {"format": "fedtune-answers-1", "kind": "label", "made": "2026-11-27T04:31:22Z"}
    found |= {"version": "", "answers": [row | changes]}
    (run / ANSWERS).write_text(json.dumps(found))
    return run


def test_base_and_adapter_are_shown_on_the_same_prompts(tried: Path, tmp_path: Path) -> None:
    page = shown(answered(tried, tmp_path))
    for text in ("Does it hurt?", "2026-11-27 04:31:22 UTC", "probability 0.999", "as expected"):
        assert text in page, text
    assert page.index("base alone") < page.index("with the adapter")
    assert page.count("not as expected") == 1
    without = shown(tried / "runs" / "tried")
    assert "Before and after, on" not in without and "fedtune answers" in without
    assert "fedtune answers" not in page


@pytest.mark.parametrize("field", ["prompt", "expected", "base"])
def test_markup_in_a_public_record_is_text(field: str, tried: Path, tmp_path: Path) -> None:
    value: Any = {"answer": MARKUP} if field == "base" else MARKUP
    page = shown(answered(tried, tmp_path, **{field: value}))
    assert "<script>alert" not in page and "<img" not in page.partition("<main")[2]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7*7 }}" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 7, "base": [], "adapter": None, "expected": {}},
        {"base": {"answer": 3, "probability": float("nan")}},
        {"adapter": {"answer": "yes", "probability": 1e9}},
        {"prompt": "long " * 10_000},
    ],
)
def test_answers_of_another_form_break_no_page(
    changes: dict[str, Any], tried: Path, tmp_path: Path
) -> None:
    page = shown(answered(tried, tmp_path, **changes))
    assert "Before and after" in page and len(page) < 60_000


def test_answers_of_another_version_are_not_shown(tried: Path, tmp_path: Path) -> None:
    run = answered(tried, tmp_path)
    (run / "adapter").rename(run / "versions-3")
    (run / "adapter").symlink_to("versions-3")
    assert "Does it hurt?" not in shown(run)
    (run / ANSWERS).write_text("not JSON")
    assert "Before and after" in shown(run)


def test_a_site_sees_its_own_loss_and_nobody_else_does(tried: Path) -> None:
    site, run = tried / "north" / "site.toml", tried / "runs" / "tried"
    text = (tried / "north" / "state" / "losses.jsonl").read_text()
    kept = [json.loads(line) for line in text.splitlines()]
    (own,) = json.loads(shown(site, "series"))["own"]
    assert own["study"] == "tiny" and own["rounds"] == [row["round"] for row in kept] == [1, 2]
    assert own["losses"] == [row["loss"] for row in kept]
    page = shown(site)
    assert "Private: not protected by ε; never leaves this machine" in page
    assert "never leaves this machine" not in shown(run)
    assert "own" not in json.loads(shown(run, "series"))


def test_lines_that_fedtune_did_not_write_draw_nothing(tried: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tried, tmp_path / "copy")
    path = copy / "north" / "state" / "losses.jsonl"
    good = path.read_text()
    row = json.loads(good.splitlines()[0])
    bad = [row | {"study": SECRET}, row | {"plan": MARKUP}, row | {"round": "1"}, [], "x", None]
    path.write_text("".join(json.dumps(one) + "\n" for one in bad) + "{torn\n" + good)
    own = json.loads(shown(copy / "north", "series"))["own"]
    assert own == json.loads(shown(tried / "north", "series"))["own"]
    again = [row | {"loss": 9.0}, row | {"plan": "sha256:" + "0" * 64, "loss": float("nan")}]
    path.write_text(good + "".join(json.dumps(one) + "\n" for one in again))
    newest, older = json.loads(shown(copy / "north", "series"))["own"]
    assert newest["losses"] == [None] and older["losses"][0] == 9.0
    path.unlink()
    assert json.loads(shown(copy / "north", "series"))["own"] == []
