"""What a site's own screen, log and status say of its part in a study."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Context, Message
from rich.console import Console

from fedtune.cli.watch import Watch
from fedtune.core.config import load_site, load_study, study_from_json
from fedtune.core.dp.accountant import epsilon
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.registry.reasons import WAITING
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault import studies
from fedtune.core.vault.answers import Place
from fedtune.core.vault.budget import MOST_ATTEMPTS
from fedtune.core.vault.declared import declare
from fedtune.core.vault.process import answer_and_tell
from fedtune.core.vault.worker import worker
from fedtune.core.wire.arrays import pack_arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import Request
from fedtune.core.wire.seal import sign_end
from fedtune.dashboard.pages.site import SitePage
from fedtune.flower.grid import InProcessGrid
from fedtune.launch.site import Shown
from fedtune.observe import observer
from fedtune.observe.status import read_status
from fedtune.public.start import start
from fedtune.runs.run import Run
from fedtune.server import admission, rounds
from fedtune.server.admission import plan_message
from fedtune.server.orders import tell_finished
from fedtune.server.parts import Dependencies, Settings
from tests.cli_kit import run
from tests.client.site_kit import trains
from tests.guarantee.world import NAMES, lay_out, patients
from tests.site_here import SiteHere

Event = Callable[[str, dict[str, Any]], None]


def through_the_executor(
    study: Path, tell: Event, on_event: Event, reviewed: str = "", signing: float = 0.0
) -> SiteHere:
    """The study, each site's answers given as `fedtune client` gives them; `tell`: the north's.
    Returns the north."""
    process_cache.clear("workers")
    files = {name: study.parent / f"site-{name}.toml" for name in NAMES}
    parts = Dependencies(settings=Settings(patience=0.0, pause=0.0, signing=signing))
    key = parts.settings.key.public
    sites = {
        str(path): SiteHere(path, tell if name == "north" else _quiet, key, reviewed)
        for name, path in files.items()
    }

    def app(message: Message, context: Context) -> Message:
        return sites[str(context.node_config["site"])].reply(message, context)

    grid = InProcessGrid(list(files.values()), app)  # type: ignore[arg-type]
    rounds.run(grid, load_study(study), study.parent / "run", parts=parts, on_event=on_event)
    return sites[str(files["north"])]


def _quiet(*_: Any) -> None:
    pass


def test_each_round_is_told_with_its_number_and_what_was_paid(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    console = Console(record=True, width=60, file=io.StringIO())
    with (
        Watch(console, "connecting") as watch,
        observer("site", tmp_path / "state-north", then=watch) as seen,
    ):
        north = through_the_executor(study, seen, _quiet)
    ended = north.shown._describe_finish()  # when the coordinator has gone
    assert ended["text"] == "study inventory is finished; waiting for another; Ctrl-C ends"
    north.shown._last |= {"status": "trained", "round": 2}
    assert not north.shown._describe_finish()
    shown = [line.rstrip() for line in console.export_text().splitlines()]
    lines = [line for line in shown if line.startswith(("connecting", "inventory"))]
    charges = worker(str(tmp_path / "site-north.toml")).ledger.charges("records")
    planned = plan_for_site(load_study(study), 20).epsilon
    cost = f"of {rounded_up(planned)} planned"
    assert lines[0] == "connecting"
    assert lines[1].startswith(f"inventory: admitted; paid so far: ε = 0 {cost}. NOBODY HERE HAS")
    trained = lines[2:5]
    assert all(cost in line for line in trained)
    assert [line.partition(";")[0] for line in trained] == [
        f"inventory: round {n} of 3 trained" for n in (1, 2, 3)
    ]
    assert trained[-1].endswith("that was the last round")
    assert lines[5:] == ["inventory: finished; the last round here was 3 of 3"]
    log = [
        json.loads(line)
        for line in (tmp_path / "state-north/log.jsonl").read_text().split("\n")[:-1]
    ]
    paid = [entry["epsilon"]["north"] for entry in log if entry.get("status") == "trained"]
    assert len(paid) == 3 and paid == sorted(paid)
    assert paid[-1] == pytest.approx(epsilon([c.event for c in charges], 1e-3), abs=2e-6)
    kept = read_status(tmp_path / "state-north").status
    assert kept["round"] == 3 and kept["sites"]["north"]["epsilon"] == paid[-1]
    assert kept["sites"]["north"]["planned"] == pytest.approx(planned, abs=2e-6)


def test_a_site_hears_that_a_study_ended(tmp_path: Path, tiny_base: Path) -> None:
    north = through_the_executor(lay_out(tmp_path, tiny_base, patients(12)), _quiet, _quiet)
    north.shown._last |= {"status": "trained", "round": 2}
    key = SigningKey()
    assert not north.shown._describe_finish(), "not told as yet"

    def app(message: Message, context: Context) -> Message:
        return north.reply(message, context)

    grid = InProcessGrid([tmp_path / "site-north.toml"], app)  # type: ignore[arg-type]
    (node,) = grid.get_node_ids()
    north.place = replace(north.place, coordinator=key.public)
    plan = plan_message(Run(tmp_path / "run").study, {}, key)
    roster: Any = SimpleNamespace(grid=grid, plan=plan, nodes={"north": node}, expect=_quiet)
    tell_finished(roster, key)
    assert north.shown._last["status"] == "finished"
    assert "finished; the last round here was 3 of 3" in north.shown._last["text"]
    ended = north.shown._describe_finish()
    assert ended["text"] == "study inventory is finished; waiting for another; Ctrl-C ends"


def test_a_site_of_declared_data_reads_who_pays(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    path = tmp_path / "site-north.toml"
    text = path.read_text().replace("[data]", '[data]\ndeclared = "public"')
    path.write_text(text.replace("[policy]", "[policy]\nallow_declared_data = true"))
    declare(load_site(path))
    told: list[str] = []
    with observer("site", tmp_path / "state-north") as seen:

        def tell(event: str, data: dict[str, Any]) -> None:
            told.append(str(data.get("text")))
            seen(event, data)

        through_the_executor(study, tell, _quiet)
    *rounds_told, ended = told
    paid = "from a ledger of the run: the data is declared public"
    assert all(paid in line for line in rounds_told) and "finished" in ended
    assert len(rounds_told) == 4 and "paid so far: ε = 0 of" not in rounds_told[-1]
    north = read_status(tmp_path / "state-north").status["sites"]["north"]
    assert north["declared"] == "public" and north["epsilon"] > 0


@pytest.mark.parametrize(
    "refused_for",
    [
        *("its signature", "a rule", "its cost", "there are too many", "it has ended"),
        *("it waits for a person", "its base", None),
    ],
)
def test_a_refused_plan_of_declared_data_begins_no_ledger(
    tmp_path: Path, tiny_base: Path, refused_for: str | None
) -> None:
    """Nor is anything of it kept in memory: there would be one for each name that somebody makes
    up, also of studies that have ended. Twin: one that is admitted is kept until its study ends,
    and its first order begins a ledger."""
    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    path = tmp_path / "site-north.toml"
    text = path.read_text().replace("[data]", '[data]\ndeclared = "public"')
    rule = "allow_declared_data = true\n" + "max_steps = 1\n" * (refused_for == "a rule")
    rule += 'admission = "signed"\n' * (refused_for == "it waits for a person")
    rule += "max_epsilon = 0.001\n" * (refused_for == "its cost")
    path.write_text(text.replace("[policy]", f"[policy]\n{rule}"))
    declare(load_site(path))
    own, begun = SigningKey(), start(study)
    if refused_for == "its base":
        begun = replace(begun, study=begun.study.changed(base={"digest": f"sha256:{7:064x}"}))
    key = SigningKey() if refused_for == "its signature" else own
    plan = dict(plan_message(begun.study, begun.frozen, key).config_records["plan"])
    if refused_for == "it has ended":
        plan |= sign_end(key, begun.study.digest)
    request = Request("prepare", {"plan": plan}, pack_arrays(begun.frozen))
    told: list[dict[str, Any]] = []
    if refused_for == "there are too many":
        (tmp_path / "state-north" / studies.FOLDER).mkdir(parents=True)
        for number in range(studies.MOST):
            (tmp_path / "state-north" / studies.FOLDER / f"{number}.json").write_text("{}")
    place = Place(site=str(path), coordinator=own.public)
    answer_and_tell(place, request, lambda _, facts: told.append(facts))  # type: ignore[arg-type,return-value]
    statuses = {"it has ended": "finished", "it waits for a person": WAITING, None: "admitted"}
    assert told[-1]["status"] == statuses.get(refused_for, "refused")
    assert ("planned" in told[-1]) is (refused_for in (None, "it waits for a person"))
    ledgers = (tmp_path / "state-north").rglob
    assert len([*ledgers("ledger.db")]) == 1  # the lifetime ledger
    kept = place.worker()._of_runs
    assert [*kept] == ([begun.study.digest] if refused_for is None else [])
    if refused_for is None:
        end = Request("prepare", {"plan": plan | sign_end(own, begun.study.digest)})
        answer_and_tell(place, end, lambda _, facts: told.append(facts))  # type: ignore[arg-type]
        assert (told[-1]["status"], told[-1]["round"], kept) == ("finished", 0, {})
        assert len([*ledgers("ledger.db")]) == 1
        answer_and_tell(place, request, lambda _, facts: told.append(facts))  # type: ignore[arg-type,return-value]
        trains(place.worker().of_run(begun.study.digest), begun, 1)
        assert len([*ledgers("ledger.db")]) == 2


def test_of_many_runs_of_declared_data_the_newest_are_kept(tmp_path: Path, tiny_base: Path) -> None:
    lay_out(tmp_path, tiny_base, patients(12))
    path = tmp_path / "site-north.toml"
    path.write_text(path.read_text().replace("[data]", '[data]\ndeclared = "public"'))
    site, names = worker(str(path)), [f"sha256:{number:064x}" for number in range(studies.MOST + 2)]
    runs = {name: site.begin_run(name) for name in names}
    for name, of_run in runs.items():
        site.keep_run(name, of_run)
    site.keep_run(names[2], runs[names[2]])  # admitted again
    assert [*site._of_runs] == [*names[3:], names[2]]
    assert all(site.of_run(name) is site.begin_run(name) is runs[name] for name in names[2:])
    assert site.of_run(names[0]) is site, "its orders are answered: send the plan again"


@pytest.mark.parametrize("named", ["policy.max_epsilon", "x' policy.max_epsilon"])
def test_a_name_in_a_plan_does_not_have_its_cost_explained(
    tmp_path: Path, tiny_base: Path, named: str
) -> None:
    """The refusal quotes the name; an explanation would compute ε some seven times."""
    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    assert study.lora
    study = study.model_copy(update={"lora": study.lora.model_copy(update={"modules": (named,)})})
    own, path = SigningKey(), tmp_path / "site-north.toml"
    plan = dict(plan_message(study, {}, own).config_records["plan"])
    told: list[dict[str, Any]] = []
    place = Place(site=str(path), coordinator=own.public)
    answer_and_tell(
        place,
        Request("prepare", {"plan": plan}, pack_arrays({})),
        lambda _, facts: told.append(facts),  # type: ignore[arg-type,return-value]
    )
    assert told[-1]["status"] == "refused" and "policy.max_epsilon" in told[-1]["reason"]
    assert "what fits" not in told[-1]["text"]


def test_a_damaged_ledger_is_a_failure_on_the_screen(tmp_path: Path, tiny_base: Path) -> None:
    """Not an answer without a description, after which `status --check` says ok; also once the
    courier has told that it sent the answer."""
    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    path, own, begun = tmp_path / "site-north.toml", SigningKey(), start(study)
    plan = dict(plan_message(begun.study, begun.frozen, own).config_records["plan"])
    request = Request("prepare", {"plan": plan}, pack_arrays(begun.frozen))
    told: list[tuple[str, dict[str, Any]]] = []
    screen = Shown(load_site(path), lambda *event: told.append(event))
    for _ in range(2):
        process_cache.clear("workers")
        place = Place(site=str(path), coordinator=own.public)
        answer_and_tell(place, request, screen.from_vault)  # type: ignore[arg-type]
        screen.from_courier("answered", {"kind": "prepare", "bytes_up": 1})
        assert (load_site(path).home / "ledger.db").exists()
        (load_site(path).home / "ledger.db").write_bytes(b"no ledger")
    assert [facts["status"] for _, facts in told] == ["admitted", "failed"]
    assert "ledger" in told[-1][1]["text"] and "--restore" in told[-1][1]["text"]


def with_rule(folder: Path, rule: str) -> Path:
    """The north's site.toml, whose policy.admission is `rule`."""
    path = folder / "site-north.toml"
    path.write_text(path.read_text().replace("[policy]", f'[policy]\nadmission = "{rule}"'))
    return path


def test_a_plan_that_waits_for_a_person_is_told_once_with_what_it_costs_and_how_to_sign(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the screen, in the status, in the audit log; nothing is charged before."""
    monkeypatch.setattr(admission, "ASK_SECONDS", (0.0, 0.0))
    study = lay_out(tmp_path, tiny_base, patients(12))
    path, told, asked = with_rule(tmp_path, "reviewed"), list[str](), list[str]()
    ledger = Ledger(tmp_path / "state-north")

    def hear(event: str, data: dict[str, Any]) -> None:
        seen(event, data)
        told.append(str(data.get("text")))
        if data.get("status") == "waiting":
            assert not ledger.charges("records")
            shown = run("status", path, "--once").output
            assert "waiting for a person here to sign the plan" in shown
            asked.extend(re.findall(r"`(fedtune review \S+ --site \S+)`", told[-1]))

    def on_event(event: str, data: dict[str, Any]) -> None:
        if event == "step" and "waiting for people at north" in str(data.get("text")):
            assert run(*asked[0].split()[1:], "--sign").exit_code == 0

    with observer("site", tmp_path / "state-north") as seen:
        through_the_executor(study, hear, on_event, signing=60.0)
        assert not SitePage(path).read_context()["notices"]  # somebody has signed meanwhile
    assert "SIGNED" not in " ".join(told)
    (waits,) = [line for line in told if "WAITING" in line]
    assert "Nothing of it runs before a person here signs it" in waits and "ε = " in waits
    assert len(told) == 6 and "round 3 of 3 trained" in told[-2] and "finished" in told[-1]
    log = audit_log.verify(tmp_path / "state-north", ledger.key.public)
    events = [entry["event"] for entry in log.entries]
    assert events == ["wait", "sign", "admit", "release", "release", "release"]
    assert log.entries[2]["facts"]["signed"] is True


def test_a_plan_that_runs_by_a_standing_policy_alone_is_announced_before_it_spends(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twin, above: one that a person here signed is not."""
    study = lay_out(tmp_path, tiny_base, patients(12))
    path, told = tmp_path / "site-north.toml", list[str]()
    ledger = Ledger(tmp_path / "state-north")

    def hear(event: str, data: dict[str, Any]) -> None:
        seen(event, data)
        told.append(str(data.get("text")))
        if len(told) == 1:
            assert not ledger.charges("records")

    with observer("site", tmp_path / "state-north") as seen:
        through_the_executor(study, hear, _quiet)
        assert "nobody here has signed this plan" in run("status", path, "--once").output
        (notice,) = SitePage(path).read_context()["notices"]
    assert 'NOBODY HERE HAS SIGNED THIS PLAN; it runs by policy.admission = "standing"' in told[0]
    spends = re.search(r"it spends ε = (\S+) of 'records', and up to (\S+) if the", told[0])
    assert spends and "fedtune review" in told[0]
    charges = [charge.event for charge in ledger.charges("records")]
    often = [event._replace(steps=event.steps * MOST_ATTEMPTS) for event in charges]
    limit = load_site(path).policy.max_epsilon_per_study
    assert spends[1] == rounded_up(epsilon(charges, 1e-3))
    assert spends[2] == rounded_up(min(limit, epsilon(often, 1e-3)))
    assert "nobody here signed it: fedtune review" in notice["text"]
    log = audit_log.verify(tmp_path / "state-north", ledger.key.public)
    assert log.entries[0]["event"] == "admit" and log.entries[0]["facts"]["signed"] is False


def test_what_was_sent_and_received_is_counted_at_the_site(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    with observer("site", tmp_path / "state-north") as seen:
        through_the_executor(study, seen, _quiet)
    rounds_of = Run(tmp_path / "run").report["rounds"]
    north = read_status(tmp_path / "state-north").status["sites"]["north"]
    for way in ("bytes_up", "bytes_down"):
        counted = sum(entry[way]["north"] for entry in rounds_of)
        assert 0 < counted <= north[way] < counted + 2_000  # and that the study has ended


def test_a_refused_site_is_told_why(tmp_path: Path, tiny_base: Path) -> None:
    """A kill -9 cost it a round too many; its own screen, log and status say so."""
    study = lay_out(tmp_path, tiny_base, patients(12))
    console = Console(record=True, width=60, file=io.StringIO())

    def crash(event: str, data: dict[str, Any]) -> None:
        if event == "round" and data["round"] == 2:
            ledger = worker(str(tmp_path / "site-north.toml")).ledger
            for _ in range(8):
                ledger.reserve("records", ledger.charges("records")[-1], "x", lambda _: None)

    with (
        Watch(console, "connecting") as watch,
        observer("site", tmp_path / "state-north", then=watch) as seen,
        suppress(FedtuneError),
    ):
        through_the_executor(study, seen, crash)
    last = console.export_text().rstrip().splitlines()[-1]
    assert last.startswith("inventory: round 3 of 3 REFUSED: ") and "policy.max_epsilon" in last
    entries = (tmp_path / "state-north/log.jsonl").read_text().splitlines()
    said = next(e for e in map(json.loads, entries) if e.get("status") == "refused")
    assert said["round"] == 3 and said["reason"].startswith("policy.max_epsilon")
    north = read_status(tmp_path / "state-north").status["sites"]["north"]
    assert north["status"] == "refused" and north["reason"] == said["reason"]


@pytest.mark.parametrize("same", [True, False])
def test_a_plan_other_than_the_reviewed_one_is_shown_as_another(
    tmp_path: Path, tiny_base: Path, same: bool
) -> None:
    """And what it is can be read at the site; the plan that was reviewed says nothing."""
    study, texts, digests = lay_out(tmp_path, tiny_base, patients(12)), list[str](), list[str]()

    def tell(event: str, facts: dict[str, Any]) -> None:
        if event == "answered":
            texts.append(facts["text"])
            digests.append(facts["plan_digest"])

    through_the_executor(study, tell, _quiet)
    resolved, other = digests[0], "sha256:" + "0" * 64
    for folder in tmp_path.glob("state-*"):
        shutil.rmtree(folder)
    shutil.rmtree(study.parent / "run")
    texts.clear()
    through_the_executor(study, tell, _quiet, resolved if same else other)
    kept = tmp_path / "state-north" / "plans"
    if same:
        assert not any("NOT the plan" in text for text in texts) and not kept.exists()
        return
    assert "NOT the plan that came with the coordinator's answer (sha256:000" in texts[0]
    assert not any("NOT the plan" in text for text in texts[1:])  # once, when it was sent
    (file,) = kept.iterdir()
    assert str(file) in texts[0]
    assert study_from_json(file.read_text()).digest == resolved
