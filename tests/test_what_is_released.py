"""What a run releases, as its folder, its report, its signature and `fedtune verify` say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as torch_files
from safetensors.numpy import load_file, save_file

from fedtune import load_study
from fedtune import report as reports
from fedtune.core.errors import NotGenuine
from fedtune.core.wire.keys import SigningKey
from fedtune.derive.export import export
from fedtune.evaluation.run import evaluate
from fedtune.evidence import sign
from fedtune.evidence.dossier.content import build
from fedtune.evidence.dossier.facts import documents
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.dossier.release import release
from fedtune.evidence.verify import verify
from fedtune.officer.site_files import sites_in
from fedtune.report.gain import choose_better
from fedtune.report.start_file import CHECKPOINT, START
from fedtune.runs.run import Run, open_run
from fedtune.server import store, summary
from fedtune.server.release import decide
from fedtune.strategies._posterior import ClassFigures
from tests.cli_kit import run as command
from tests.expected import raises_nothing, raises_only
from tests.report.test_gain import on_dashboard, on_screen
from tests.simulated import noise_from, simulate
from tests.test_prototypes import LABELS, PRIVATE, lay_out, note, write
from tests.verify_kit import forged

SELECTION = """
[selection]
path = "selection.jsonl"
columns = { text = "t", label = "l" }
"""


def finished(
    folder: Path, base: Path, wrong: bool = False, lacking: bool = False, private: bool = True
) -> tuple[Path, Any]:
    """A run of class statistics whose [selection] records decide what is released. wrong: whether
    the sites' labels are."""
    privacy = PRIVATE.replace("8.0", "95.0") if private else 'privacy = "off"'
    path = lay_out(folder, base, privacy, more=SELECTION)
    for site in ("a", "b", "c") if wrong else ():
        rows = [json.loads(line) for line in (folder / f"{site}.jsonl").read_text().splitlines()]
        turned = dict(zip(LABELS, [*LABELS[1:], LABELS[0]], strict=True))
        write(folder / f"{site}.jsonl", [row | {"l": turned[row["l"]]} for row in rows])
    known = LABELS[: 2 if lacking else 3]
    rows = [{"t": note(label, 30 + n), "l": label} for label in LABELS for n in range(5)]
    write(folder / "public.jsonl", rows)
    rows = [{"t": note(label, 70 + n), "l": label} for label in known for n in range(5)]
    write(folder / "selection.jsonl", rows)
    with noise_from(3):
        return folder / "run", simulate(path, sites_in(folder), folder / "run")


@pytest.fixture(scope="module")
def misled(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Any]:
    """A run that the sites' records made worse: the public start is released."""
    return finished(tmp_path_factory.mktemp("misled"), tiny_encoder, wrong=True)


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> tuple[Path, Any]:
    """Its twin, of records with their own labels: the trained model is released."""
    return finished(tmp_path_factory.mktemp("clear"), tiny_encoder)


def test_the_headline_figure_is_that_of_what_is_handed_out(misled: Any, clear: Any) -> None:
    folder, report = misled
    quality = report["quality"]
    assert quality["released"]["model"] == "start"
    assert quality["after"] == quality["start"] != quality["trained"]
    assert quality["trained"]["accuracy"] == quality["by_round"][-1]["accuracy"]
    low, high = quality["gain"]["intervals"]["accuracy"]["trained"]
    assert low <= quality["trained"]["accuracy"] <= high
    measured = evaluate(Run(folder), folder.parent / "judges.jsonl")
    assert measured["of the run"] == [line for line in quality["headline"] if "public" in line]
    assert measured["after"]["accuracy"] == pytest.approx(quality["after"]["accuracy"])
    assert measured["interval"]["change"] == pytest.approx(quality["gain"]["change"])
    heads = [load_file(folder / name / "head.safetensors") for name in ("adapter", "trained")]
    assert any((heads[0][name] != heads[1][name]).any() for name in heads[0])
    folder, report = clear
    quality = report["quality"]
    assert quality["released"]["model"] == "trained" and "trained" not in quality
    assert quality["after"]["accuracy"] == quality["by_round"][-1]["accuracy"]
    assert not (folder / "trained").exists()


def test_evaluate_compares_with_what_public_text_alone_gives(
    misled: Any, clear: Any, tmp_path: Path
) -> None:
    """On the study's own public records, so that the run's report has the same figures."""
    folder, report = clear
    judges, quality = folder.parent / "judges.jsonl", report["quality"]
    measured = evaluate(Run(folder), judges)
    assert measured["start"]["accuracy"] == pytest.approx(quality["start"]["accuracy"])
    assert measured["interval"]["over_start"] == pytest.approx(quality["gain"]["over_start"])
    assert measured["over start"] == quality["headline"][0] and not measured["no start"]
    shown = " ".join(command("evaluate", folder, "--data", judges).output.split())
    assert "public text alone" in shown and measured["over start"] in shown

    measured = evaluate(Run(misled[0]), judges)
    assert measured["start"] is None and "over_start" not in measured["interval"]
    assert measured["no start"] == "it is what this run released: this model"

    copy = shutil.copytree(folder, tmp_path / "run")  # as others get it
    (copy / CHECKPOINT).unlink()
    measured = evaluate(Run(copy), judges)
    assert (
        not measured["over start"]
        and "the coordinator's run and a dossier have it" in measured["no start"]
    )
    shown = " ".join(command("evaluate", copy, "--data", judges).output.split())
    assert f"public text alone gives: {measured['no start']}" in shown


def test_a_dossier_has_the_public_start_to_compare_with(clear: Any, tmp_path: Path) -> None:
    """Twin: another start than the plan's is not compared with, and breaks the signature."""
    folder, report = clear
    release(folder, tmp_path / "dossier")
    measured = evaluate(open_run(tmp_path / "dossier"), folder.parent / "judges.jsonl")
    assert measured["interval"]["over_start"] == pytest.approx(
        report["quality"]["gain"]["over_start"]
    )
    file = tmp_path / "dossier" / "run" / START
    save_file({name: array + 1 for name, array in load_file(file).items()}, file)
    assert open_run(tmp_path / "dossier").start() is None
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float64):
        torch_files.save_file({"weight": torch.ones(2).to(kind)}, file)
        assert open_run(tmp_path / "dossier").start() is None
    with pytest.raises(NotGenuine, match="start"):
        verify(tmp_path / "dossier")


def test_verify_says_what_is_released_and_signs_the_other_too(misled: Any, clear: Any) -> None:
    folder, _ = misled
    found = verify(folder)
    assert found.released == "start" and "trained" not in found.not_signed
    assert {"adapter/head.safetensors", "trained/head.safetensors"} <= {*sign.list_covered(folder)}
    shown = command("verify", folder, "--simulation").output
    assert "released     what public text alone gives; trained/, signed too" in shown
    assert verify(clear[0]).released == "trained"
    shown = command("verify", clear[0], "--simulation").output
    assert "released     the trained model" in shown


@pytest.mark.parametrize("name", ["changed", "added", "linked"])
def test_the_trained_model_beside_it_is_signed(misled: Any, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(misled[0], tmp_path / "run")
    with raises_nothing():
        verify(copy)
    head = copy / "trained" / "head.safetensors"
    if name == "changed":
        head.write_bytes(head.read_bytes()[:-1] + b"\x00\x01"[head.read_bytes()[-1] == 0 :][:1])
    elif name == "added":
        (copy / "trained" / "modeling.py").write_text("pass")
    else:
        shutil.move(copy / "trained", tmp_path / "elsewhere")
        (copy / "trained").symlink_to(tmp_path / "elsewhere")
    with raises_only(NotGenuine, r"trained.*(was changed|was added)"):
        verify(copy)


def _as_trained(report: dict[str, Any]) -> None:
    report["quality"]["released"]["model"] = "trained"


def _no_decision(report: dict[str, Any]) -> None:
    del report["quality"]["released"]


def _flattered(report: dict[str, Any]) -> None:
    decision = report["quality"]["released"]
    decision["trained"] = decision["start"] + 0.1


def _trained_figures(report: dict[str, Any]) -> None:
    report["quality"]["after"] = report["quality"]["trained"]


def _without_its_own(report: dict[str, Any]) -> None:
    del report["quality"]["trained"]


def _hidden(report: dict[str, Any]) -> None:
    report["quality"]["headline"] = [
        line for line in report["quality"]["headline"] if "public text" not in line
    ]


def _no_worse(report: dict[str, Any]) -> None:
    low, high = report["quality"]["gain"]["over_start"]
    report["quality"]["gain"]["over_start"] = [-high + 1e-9, -low]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "which model": (_as_trained, "trained: does not fit what the report says is released"),
    "nothing of it": (_no_decision, "released is 'None'"),
    "the figures that decided": (_flattered, "released's model is 'start'"),
    "the trained model's figure as that of the released": (
        _trained_figures,
        "the released model's figures",
    ),
    "no figure of the trained model": (_without_its_own, "the trained model's figures"),
    "the line": (_hidden, "quality.headline is not what its figures say"),
    "that it was worse": (_no_worse, "quality.headline is not what its figures say"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_edited_line_of_what_is_released_is_refused(
    misled: Any, tmp_path: Path, what: str
) -> None:
    """Signed again by the forger, so that no digest tells. Twin: unchanged and signed again."""
    change, why = CHANGES[what]
    with pytest.raises(NotGenuine, match=why):
        verify(forged(misled[0], tmp_path / "changed", change))
    verify(forged(misled[0], tmp_path / "same", lambda report: None))


def test_a_page_that_hides_worse_is_refused(misled: Any, tmp_path: Path) -> None:
    """Signed again by the forger. Twin: a page whose other lines were changed, which are the
    coordinator's word."""
    copy = shutil.copytree(misled[0], tmp_path / "run")
    page = (copy / "report.md").read_text()
    said = "Released: what public text alone gives"
    assert said in page
    for changed, refused in ((page.replace(said, "Released: the best"), True), (page + "x", False)):
        (copy / "report.md").write_text(changed)
        sign.sign_files(copy, SigningKey())
        if refused:
            with pytest.raises(NotGenuine, match="leaves out what the figures say"):
                verify(copy)
        else:
            verify(copy)


def test_a_choice_that_the_plan_does_not_leave_is_refused(signed: Any, tmp_path: Path) -> None:
    def claims(report: dict[str, Any]) -> None:
        report["quality"]["released"] = {"model": "trained", "why": "it is better"}

    with pytest.raises(NotGenuine, match="what the plan says of what is released"):
        verify(forged(signed[0], tmp_path, claims))


def test_records_that_lack_a_class_decide_by_what_they_cannot_see(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """By the noised share of that class: the start is released where the trained model would be
    worse even if it were right about all of it."""
    folder, report = finished(tmp_path, tiny_encoder, wrong=True, lacking=True)
    decision = report["quality"]["released"]
    assert decision["lacking"] == LABELS[2:] and 0.05 < decision["unseen"] < 0.6
    lost = decision["trained"] - decision["start"]
    assert decision["model"] == choose_better(lost, decision["unseen"])
    assert verify(folder).released == decision["model"]
    other = "start" if decision["model"] == "trained" else "trained"

    def chosen(report: dict[str, Any]) -> None:
        report["quality"]["released"]["model"] = other

    with pytest.raises(NotGenuine, match="does not fit"):
        verify(forged(folder, tmp_path / "forged", chosen))

    def another_share(report: dict[str, Any]) -> None:
        report["quality"]["released"]["unseen"] = 0.99

    with pytest.raises(NotGenuine, match="unseen"):
        verify(forged(folder, tmp_path / "shares", another_share))


def test_without_noise_there_are_no_shares_to_decide_by(tmp_path: Path, tiny_encoder: Path) -> None:
    """Its counts are no figure of the report, so that a choice by them could not be checked."""
    folder, report = finished(tmp_path, tiny_encoder, lacking=True, private=False)
    decision = report["quality"]["released"]
    assert decision["model"] == "trained" and "unseen" not in decision
    assert not any("units" in row for row in report["quality"]["classes"])
    assert verify(folder).released == "trained"


def test_without_shares_records_that_lack_a_class_decide_nothing() -> None:
    asked = SimpleNamespace(lacking=("rash",))
    table = SimpleNamespace(release="better")
    study = SimpleNamespace(start=object(), selection=table, evaluation=None, private=True)
    progress = SimpleNamespace(study=study, origin={"a": 1}, adapter={}, history=[])
    assert decide(progress, asked)["model"] == "trained"  # type: ignore[arg-type]


def test_a_dossier_and_an_exported_model_hand_on_what_is_released(
    misled: Any, tmp_path: Path
) -> None:
    folder, report = misled
    found = release(folder, tmp_path / "dossier")
    assert found.released == "start" and (tmp_path / "dossier" / "run" / "trained").is_dir()
    said = report["quality"]["headline"]
    for name in ("dossier.md", "dossier.html", "README.md"):
        text = (tmp_path / "dossier" / name).read_text()
        assert all(line.partition(" ([")[0][:80] in text for line in said), name
    export(Run(folder), tmp_path / "model")
    assert verify(tmp_path / "model").released == "start"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "eleased: what public text alone gives" in card


def test_every_class_has_its_noised_count_and_what_is_recognised_of_it(
    clear: Any, tmp_path: Path
) -> None:
    """Twin: nothing is counted of one site alone, or without noise."""
    folder, report = clear
    rows = report["quality"]["classes"]
    assert [row["name"] for row in rows] == LABELS and {row["known_from"] for row in rows} <= {
        "public records",
        "public records and sites",
    }
    assert sum(row["units"] for row in rows) == pytest.approx(36, abs=6 * rows[0]["deviation"])
    assert all(row["units"] != round(row["units"]) and row["deviation"] > 0 for row in rows)
    right = sum(row["recall"] * row["records"] for row in rows)
    assert right / 12 == pytest.approx(report["quality"]["after"]["accuracy"])
    assert sum(row["predicted"] for row in rows) == 12
    for text in (
        (folder / "report.md").read_text(),
        markdown(build(documents(folder), {})),
        on_dashboard(folder),
    ):
        assert "By class" in text and all(label in text for label in LABELS)
    progress = store.load(folder, load_study(folder.parent / "study.toml"))
    assert progress is not None
    figures = ClassFigures(
        np.ones(3), 1.0, np.array([True, False, True]), np.array([True, False, False])
    )
    assert "units" in summary.classes(progress, None, figures, {})[0]
    for entry in progress.history:
        entry["participants"] = ["a"]
    one = summary.classes(progress, None, figures, {})
    assert [row["known_from"] for row in one] == [
        "public records and sites",
        "nothing",
        "public records",
    ]
    assert not any("units" in row for row in one)
    open_plan = progress.study.model_copy(update={"privacy": "off"})
    assert summary.classes(replace(progress, study=open_plan), None, figures, {}) == []


def test_classes_that_nothing_was_learnt_of_are_named(clear: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(clear[0], tmp_path / "run")
    report = json.loads((copy / "report.json").read_text())
    report["quality"]["classes"][2] |= {"known_from": "nothing", "recall": 0.0, "predicted": 0}
    reports.write(copy, report)
    for text in (on_screen(copy), (copy / "report.md").read_text(), on_dashboard(copy)):
        assert "f 1 class nothing was learnt: rash" in text
        assert "lasses never predicted: rash" in text
    for text in (on_screen(clear[0]), on_dashboard(clear[0])):
        assert "nothing was learnt" not in text
