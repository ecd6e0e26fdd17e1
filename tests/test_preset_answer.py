"""`fedtune init --task answer`: a study of one's own questions and answers, without an edit."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError
from fedtune.evaluation.selection import check_apart
from fedtune.officer.site_files import load_sites
from fedtune.presets import Records, _adapter, answer, write


def table(path: Path, patients: int, each: int = 3, first: int = 0) -> Path:
    """`each` questions of every patient, with commas, quotes and line breaks."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["patient", "question", "answer"])
        for n in range(first, first + patients):
            for m in range(each):
                writer.writerow([f"p{n}", f'What of {n}, "{m}"?', f"It is {n}.\nAnd {m}."])
    return path


def records(folder: Path, **changes: object) -> Records:
    given = {
        "patient": "patient",
        "data": (table(folder / "north.csv", 20), table(folder / "south.csv", 20, first=20)),
        "evaluation": table(folder / "public.csv", 50, first=40),
    }
    return Records(**(given | changes))  # type: ignore[arg-type]


def parts(folder: Path, *names: str) -> dict[str, list[str]]:
    return {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in names}


def test_it_loads_without_an_edit(tmp_path: Path) -> None:
    study = load_study(write(tmp_path / "own", "answer", records(tmp_path))[0])
    assert study.public and study.selection and study.evaluation and study.lora
    assert study.lora.a_init == "public" and study.lora.preconditioner and study.start.steps
    check_apart(study)
    sites = load_sites(tmp_path / "own" / "sites")
    assert [site.site.declared_size for site in sites] == [200, 200]


def test_no_patient_is_in_two_parts_of_the_public_records(tmp_path: Path) -> None:
    write(tmp_path / "own", "answer", records(tmp_path))
    divided = parts(tmp_path / "own", "public", "selection", "evaluation")
    counts = {name: len(rows) for name, rows in divided.items()}
    assert sum(counts.values()) == 150 and counts["public"] == pytest.approx(75, abs=3)
    assert counts["selection"] == pytest.approx(30, abs=3)
    patients = [
        {json.loads(row)["question"].split()[2] for row in rows} for rows in divided.values()
    ]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 50


def test_other_public_records_are_learnt_from_and_none_of_them_judges(tmp_path: Path) -> None:
    other = table(tmp_path / "other.csv", 60)  # of which ten are in public.csv too
    own = records(tmp_path, public=other, evaluation=table(tmp_path / "p.csv", 50, first=50))
    write(tmp_path / "own", "answer", own)
    divided = parts(tmp_path / "own", "public", "selection", "evaluation")
    assert len(divided["public"]) == 180
    assert not {*divided["public"]} & {*divided["selection"], *divided["evaluation"]}
    assert len(divided["selection"]) + len(divided["evaluation"]) == 120


def test_too_few_public_records_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    few = table(tmp_path / "few.csv", 13)
    for evaluation, found in ((None, "none"), (few, "39")):
        with pytest.raises(ConfigError, match=f"too few public questions with answers: {found}"):
            write(tmp_path / "own", "answer", records(tmp_path, evaluation=evaluation))
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("asked", "best"), [(0.5, 12.0), (1.0, 24.0), (2.0, 60.0), (3.0, 90.0), (8.0, 150.0)]
)
def test_the_step_follows_the_noise_as_medquads_best_ones_did(asked: float, best: float) -> None:
    """Chosen on validation documents of nine sources with 784 documents together."""
    own = Records(epsilon=asked, size=87, data=tuple(Path(str(n)) for n in range(9)))
    assert best / 2 < answer.learning_rate(own) < best * 2


@pytest.mark.parametrize(("size", "narrow"), [(50, True), (100, True), (1000, False)])
def test_where_noise_is_loud_a_round_trains_few_directions(
    tmp_path: Path, size: int, narrow: bool
) -> None:
    own = records(tmp_path, size=size)
    study = load_study(write(tmp_path / "own", "answer", own)[0])
    assert study.lora and study.lora.preconditioner
    assert study.lora.preconditioner.narrow is narrow
    assert (study.training.learning_rate <= _adapter.NARROW_LONGEST) is narrow
    instruct = replace(own, prompt="question", target="answer")
    plan = load_study(write(tmp_path / "instruct", "instruct", instruct)[0])
    assert plan.lora and plan.lora.preconditioner and not plan.lora.preconditioner.narrow
