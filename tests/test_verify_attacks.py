"""Folders of an attacker, and of a coordinator who lies, that `fedtune verify` once let pass."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Study, load_site, load_study
from fedtune.core.dp.accountant import epsilon
from fedtune.core.errors import FedtuneError, NotGenuine
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.loaded import load
from fedtune.core.models.teacher import find_teacher
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import load_plan
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import figures, sign, step_summary
from fedtune.evidence.dossier.release import release
from fedtune.evidence.verify import verify
from fedtune.launch import simulate as launch
from fedtune.officer.review import would_refuse
from fedtune.runs.teacher_admission import register_teacher
from fedtune.server.teacher import with_teacher
from tests.cli_kit import run as command
from tests.simulated import simulate
from tests.test_end_to_end import lay_out
from tests.verify_kit import forged, lower, of_own_keys, write_report

PRIVACY = '{ epsilon = 8.0, noise_multiplier = 2.0, delta = 1e-3, unit = "patient" }'


def test_a_genuine_run_inside_a_false_one_proves_nothing_of_it(signed, tmp_path: Path) -> None:
    folder, found = signed
    false = shutil.copytree(folder, tmp_path / "false")
    for name in (sign.SIGNATURE, sign.EVIDENCE):
        (false / name).unlink()
    shutil.copytree(folder, false / "run")
    with pytest.raises(NotGenuine, match="is not signed"):
        verify(false, trust=found.signer)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "run").symlink_to(folder)
    with pytest.raises(NotGenuine, match="is a link"):
        verify(tmp_path / "model", trust=found.signer)
    command("export", false, "--out", tmp_path / "card")
    assert "by a report that nobody signed" in (tmp_path / "card" / "README.md").read_text()


def again(copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """evidence.json changed, and signed for by a coordinator who lies."""
    content = json.loads((copy / sign.EVIDENCE).read_text())
    change(content)
    (copy / sign.EVIDENCE).write_bytes(canonical(content))
    sign.sign_files(copy, SigningKey())
    return copy


def test_a_coordinator_cannot_leave_a_round_out(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    report = json.loads((copy / "report.json").read_text())
    report["rounds"] = report["rounds"][:1]
    write_report(copy, report)

    def first(content: dict[str, Any]) -> None:
        content["updates"] = [e for e in content["updates"] if e["round"] == 1]

    with pytest.raises(NotGenuine, match="has 1 rounds; expected all 2 rounds"):
        verify(again(copy, first))
    report["rounds"] = []
    write_report(copy, report)
    with pytest.raises(NotGenuine, match="has 0 rounds"):
        verify(again(copy, lambda content: content.update(updates=[])))


def test_no_other_work_of_a_site_counts_as_an_update(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")

    def answered(content: dict[str, Any]) -> None:
        content["updates"][0]["said"]["status"] = "answered"

    with pytest.raises(NotGenuine, match="another kind of work"):
        verify(again(copy, answered))


@pytest.mark.parametrize("name", ["report.md", "evidence.json", "adapter/adapter_config.json"])
def test_a_pipe_or_a_link_in_a_files_place_is_refused(signed, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(NotGenuine, match="was changed"):
        verify(copy)
    (copy / name).unlink()
    (copy / name).symlink_to(signed[0] / name)
    with pytest.raises(NotGenuine, match="was changed"):
        verify(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": []}, {"rounds": [{"round": "1"}]}, {"rounds": None}, {"continuous": []},
        {"study": "other"}, {"plan_digest": "sha256:0"}, {"private": 1},
    ],
)  # fmt: skip
def test_a_report_that_is_none_has_a_named_error(signed, tmp_path: Path, change) -> None:
    with pytest.raises(FedtuneError) as raised:
        verify(forged(signed[0], tmp_path, lambda report: report.update(change)))
    assert raised.value.exit_code == 2


def test_what_is_printed_of_a_folder_cannot_pose_as_a_line(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")
    (copy / "a\nprivacy      ε = 0.01, 40 sites\x1b[2J").write_text("")
    shown = command("verify", copy).output
    assert shown.count("\nprivacy ") == 1 and "\x1b" not in shown


def test_a_run_whose_sites_answered_a_private_evaluation(tmp_path: Path, tiny_base: Path) -> None:
    """Their logs are checked too, what they cost beside the updates is said, and an answer left out
    is missed."""
    from tests.private_evaluation_kit import world

    (tmp_path / "queried").mkdir()
    study = world(tmp_path / "queried", tiny_base, 3.0)
    run = tmp_path / "run"
    simulate(study, sorted(study.parent.glob("site-*.toml")), run)
    found = verify(run)
    books = [Ledger(study.parent / "state-north").charges(name) for name in ("records", "held-out")]
    spent = [charge.event for charges in books for charge in charges]
    assert found.epsilon is not None and found.with_queries is not None
    assert found.with_queries == pytest.approx(epsilon(spent, 1e-3)) and len(spent) == 5
    assert found.with_queries > found.epsilon + 0.1
    said = (
        f"with the answers to private queries ε = {rounded_up(found.with_queries)}, for a patient"
    )
    assert said in " ".join(command("verify", run).output.split())
    copy = shutil.copytree(run, tmp_path / "less")

    def silent(content: dict[str, Any]) -> None:
        content["updates"] = [e for e in content["updates"] if e["kind"] == "update"]

    with pytest.raises(NotGenuine, match="evaluation's sites"):
        verify(again(copy, silent))


def test_a_study_with_a_schedule_and_a_rollback(tmp_path: Path, tiny_base: Path) -> None:
    """What is exported of it verifies; another version in use does not, unless it is signed for by
    the key in the coordinator's home beside the runs, over a run that verified before."""
    text = lay_out(tmp_path, tiny_base, PRIVACY).read_text().replace("rounds = 3\n", "")
    study = tmp_path / "study.toml"
    study.write_text(text + '[schedule]\nevery = "1h"\nalpha = 0.5\nlooks = 2\n')
    run, home = tmp_path / "runs" / "daily", tmp_path / "coordinator"
    sites = sorted(tmp_path.glob("site-*.toml"))
    key = SigningKey.at(home / "signing.key")
    launch.simulate(load_study(study), [load_site(path) for path in sites], run, rounds=3, key=key)
    found = verify(run)
    assert found.sites and found.not_signed and sum(found.verdicts.values()) == 3
    sign.carry(run, tmp_path / "model")
    assert verify(tmp_path / "model").exported
    assert verify(tmp_path / "model").verdicts == found.verdicts
    index = run / "versions" / "index.json"
    decided = index.read_text()
    index.write_text(decided.replace('"better"', '"not better"', 1))
    assert index.read_text() != decided
    with pytest.raises(NotGenuine, match="says otherwise than the signed report"):
        verify(run)
    index.write_text(decided)
    assert release(run, tmp_path / "dossier").epsilon == found.epsilon
    link = tmp_path / "dossier" / "run" / "adapter"
    link.unlink()
    link.symlink_to("versions/0")
    with pytest.raises(NotGenuine, match="does not lead to the version in use"):
        verify(tmp_path / "dossier")
    in_use = os.readlink(run / "adapter")
    (run / "adapter").unlink()
    (run / "adapter").symlink_to("versions/0")
    with pytest.raises(NotGenuine, match="does not lead to the version in use"):
        verify(run)
    (run / "adapter").unlink()
    (run / "adapter").symlink_to(in_use)
    assert command("versions", run, "--rollback", 0).exit_code == 0
    assert verify(run).signer == found.signer
    weights = run / "versions" / "0" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b" ")
    command("versions", run, "--unpin")
    weights.write_bytes(whole)
    with pytest.raises(NotGenuine, match="was changed after it was signed"):
        verify(run)  # it was not as it had been signed, so nobody signed it again


def test_nothing_is_made_of_a_forged_run(signed, tmp_path: Path) -> None:
    """Twin: the run as it was signed is whole, and merge finds only that both are one."""
    folder, _ = signed
    bad, twin = forged(folder, tmp_path, lower), shutil.copytree(folder, tmp_path / "twin")
    for run, code, said in ((bad, 2, "from the sites' step logs"), (twin, 0, "the same adapter")):
        assert command("models", "verify", run).exit_code == code
        merged = command("merge", run, folder, "--no-measure", "--out", tmp_path / "merged")
        assert merged.exit_code == 2 and said in merged.stderr, merged.stderr


def test_a_teacher_that_is_not_as_it_was_signed_is_refused_where_a_person_reads(
    signed, tmp_path: Path
) -> None:
    """Twin: the run as it was signed. Its digest alone, which a round compares, is the same."""
    folder, _ = signed
    site = load_site(folder.parent / "north" / "site.toml")
    for run, genuine in (
        (forged(folder, tmp_path, lower), False),
        (shutil.copytree(folder, tmp_path / "twin"), True),
    ):
        digest = load(run).digest  # from now on it is found by its digest
        plan = distilled(load_plan(folder), str(run), digest)
        teacher = plan.objective.resolved.teacher_spec
        assert teacher is not None and find_teacher(teacher).digest == digest
        said = [str(refusal) for refusal in would_refuse(plan, site, None, None)]
        assert genuine != any("from the sites' step logs" in line for line in said), said
        with nullcontext() if genuine else pytest.raises(NotGenuine, match="step logs"):
            register_teacher(plan)


def distilled(study: Study, teacher: str, digest: str) -> Study:
    body = study.model_dump()
    body["objective"] |= {"name": "distill", "options": {"teacher": teacher, "digest": digest}}
    return Study.model_validate(body, strict=False)


def below(table: str) -> Callable[[dict[str, Any]], None]:
    """The ε of both trainings, of a site or of the run, is put below that of the student alone."""

    def change(report: dict[str, Any]) -> None:
        told = report["privacy"]
        for one in (told, *told["sites"].values()) if table == "each" else (told["sites"][table],):
            one["epsilon"] = report["teacher"]["student_epsilon"] / 2

    return change


def larger_delta(report: dict[str, Any]) -> None:
    for table in (report["privacy"], *report["privacy"]["sites"].values()):
        table["delta"] *= 10


def without_teacher(report: dict[str, Any]) -> None:
    """The run is shown as one of its own rounds alone."""
    own = report.pop("teacher")["student_epsilon"]
    report["privacy"]["epsilon"] = own
    for site in report["privacy"]["sites"].values():
        site["epsilon"] = site.pop("own_epsilon", own)


def cheap_steps(report: dict[str, Any]) -> None:
    """From these whoever merges the student, or distils it, would compose its ε."""
    for site in report["privacy"]["sites"].values():
        first, *_ = site["events"]
        site["events"] = [[*first[:2], 1, *first[3:]]]


def smaller_delta(report: dict[str, Any]) -> None:
    for table in (report["privacy"], *report["privacy"]["sites"].values()):
        table["delta"] /= 1e6


def of_sites(**figures: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        for site in report["privacy"]["sites"].values():
            site.update(figures)

    return change


def of_run(**figures: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report["privacy"].update(figures)


@pytest.mark.parametrize(
    "change, why",
    [
        (of_sites(events=[[30.0, 1.0, 1, 1]]), "further figures is"),
        (of_sites(known_as={"names": ["a", "b"]}), "further figures is"),
        (of_sites(sampling_rate=0.001), "north's q is"),
        (of_sites(max_grad_norm=9.0), "north's max_grad_norm is"),
        (of_sites(relation="replace one unit by any other"), "relation is"),
        (of_run(relation="replace one unit by any other"), "relation is"),
        (of_run(clipping="flat, never"), "clipping is"),
        (of_run(sampling="shuffled"), "sampling is"),
        (of_run(sampling_rate=0.001), "the run's σ, q"),
        (of_run(noise_multiplier=100.0), "the run's σ, q"),
        (of_run(steps=1), "the run's σ, q"),
    ],
)
def test_what_others_compose_epsilon_from_follows_from_the_logs(
    signed, tmp_path: Path, change: Callable[[dict[str, Any]], None], why: str
) -> None:
    """A merge of two runs takes the steps, and not the ε, that their reports state."""
    with pytest.raises(NotGenuine, match=why):
        verify(forged(signed[0], tmp_path, change))


def lower_own(report: dict[str, Any]) -> None:
    report["privacy"]["sites"]["north"]["own_epsilon"] /= 2


@pytest.mark.parametrize(
    "change, why",
    [
        (None, ""),
        (below("north"), "north's epsilon is .* at least"),
        (below("each"), "epsilon is .* at least"),
        (larger_delta, "delta is .* at most the plan's"),
        (lower_own, "north's epsilon is .* step logs"),
        (lambda report: report["privacy"].update(epsilon=math.nan), "epsilon is nan"),
        (lambda report: report["teacher"].update(student_epsilon=0.1), "epsilon is 0.1"),
        (lambda report: report["teacher"].update(digest="sha256:2"), "teacher's digest is"),
        (without_teacher, "teacher's digest is 'None'"),
        (cheap_steps, "steps with its teacher's is 1"),
        (smaller_delta, "north's epsilon is .* step logs"),
    ],
)
def test_a_students_own_epsilon_follows_from_its_logs_and_its_teachers_is_added(
    signed, change: Callable[[dict[str, Any]], None] | None, why: str
) -> None:
    """The run is its own teacher here, and a site of other patients trained the teacher alone."""
    folder, found = signed
    study = distilled(load_plan(folder), "runs/before", "sha256:" + "1" * 64)
    content = json.loads((folder / sign.EVIDENCE).read_text())
    logs = {e["site"]: step_summary.parse(e["said"]["events"]) for e in content["updates"]}
    own = json.loads((folder / "report.json").read_text()) | {"plan_digest": study.digest}
    parent = json.loads(json.dumps(own))
    parent["privacy"]["sites"]["west"] = parent["privacy"]["sites"]["north"] | {"key": "7" * 64}
    teacher = {"name": "b", "digest": "sha256:" + "1" * 64, "kind": "run", "report": parent}
    report = with_teacher(own, teacher)
    assert sorted(report["privacy"]["sites"]) == ["north", "south", "west"]
    if change is not None:
        change(report)
    with pytest.raises(NotGenuine, match=why) if change else nullcontext():
        keys, events = content["sites"], {"update": logs, "answer": {}}
        told = figures.privacy(folder, study, report, keys, events)
        assert told["epsilon"] == found.epsilon < told["with_teacher"]
        assert sorted(told["sites"]) == ["north", "south"]


def test_a_log_keeps_every_step_that_it_had() -> None:
    step = {"sigma": 0.5, "q": 1.0, "max_grad_norm": 1.0, "records": 1, "steps": 5}
    louder = step | {"sigma": 50.0, "steps": 6}
    assert step_summary.has_grown([step], [step | {"steps": 6}])
    assert step_summary.has_grown([step], [step, louder])
    assert not step_summary.has_grown([step], [louder])
    assert not step_summary.has_grown([step], [step])


STEP = {"q": 1.0, "max_grad_norm": 1.0, "records": 1, "steps": 1}
LAVISH = {"epsilon": None, "noise_multiplier": 0.3}
COSTLY: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a million rows of one unit": ([STEP | {"q": 0.1, "records": 10**6}], {}, "another rate"),
    "rows that the plan has not": ([STEP | {"records": 10**6}], {}, "other noise"),
    "more steps than the plan": ([STEP | {"steps": 10**8}], {}, "far more steps"),
    "sixty kinds": ([STEP | {"sigma": 1 + n / 10_000} for n in range(60)], {}, "more kinds"),
    "sixty rates": (
        [STEP | {"q": 0.1 * (1 + n * 1e-12)} for n in range(60)],
        {"training": {"sampling_rate": 0.1}},
        "more kinds",
    ),
    "a plan of as many steps": (
        [STEP | {"q": 1e-6, "sigma": 1e-3, "steps": 10**8}],
        {
            "training": {"sampling_rate": 1e-6, "local_steps": 10**6},
            "privacy": LAVISH | {"noise_multiplier": 1e-3},
        },
        "too many steps to account for",
    ),
    "a plan of as much ε": (
        [STEP | {"q": 0.1, "sigma": 0.3, "steps": 10**6}],
        {"training": {"sampling_rate": 0.1, "local_steps": 10**6}, "privacy": LAVISH},
        "steps cost ε",
    ),
}


@pytest.mark.parametrize("case", COSTLY)
def test_a_log_that_would_take_the_accountant_hours_is_refused_before(
    signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Whoever makes every key himself signs for whatever steps he likes. Twin: with the steps that
    the plan has, the same forger comes as far as the accountant, and fails there."""
    log, tables, said = COSTLY[case]
    log = [{"sigma": 1.0} | event for event in log]

    def asked(*_: Any) -> float:
        raise AssertionError("the accountant was asked")

    monkeypatch.setattr(figures, "epsilon", asked)
    with pytest.raises(NotGenuine, match=said) as raised:
        verify(of_own_keys(signed[0], tmp_path, log, tables))
    assert raised.value.exit_code == 2
    with pytest.raises(AssertionError, match="the accountant was asked"):
        verify(of_own_keys(signed[0], tmp_path, [STEP | {"sigma": 1.0}]))


def test_two_sites_have_two_keys(signed, tmp_path: Path) -> None:
    copy = shutil.copytree(signed[0], tmp_path / "copy")

    def one_key(content: dict[str, Any]) -> None:
        content["sites"]["south"] = content["sites"]["north"]

    with pytest.raises(NotGenuine, match="one key for two sites"):
        verify(again(copy, one_key))
