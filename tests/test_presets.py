"""`fedtune init --task`: a study of one's own files that works without an edit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune import presets
from fedtune.cli.main import app
from fedtune.config import load_sites, load_study
from fedtune.errors import ConfigError, DataError, InfrastructureError
from fedtune.evaluation.selection import check_selection
from fedtune.presets import Records, classify, write

LABELS = ("heart", "lungs", "skin")


def table(path: Path, rows: int, first: int = 0) -> Path:
    """Cells with commas, quotes and line breaks."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "note", "desk"])
        for n in range(first, first + rows):
            writer.writerow([n, f'note {n}, "quoted"\nsecond line', LABELS[n % 3]])
    return path


def records(folder: Path, **changes: object) -> Records:
    given = {
        "prompt": "note",
        "target": "desk",
        "data": (table(folder / "north.csv", 30), table(folder / "Süd & Co.csv", 30, 30)),
        "evaluation": table(folder / "public.csv", 90, 60),
        "size": 350,
    }
    return Records(**(given | changes))  # type: ignore[arg-type]


def test_it_loads_without_an_edit_and_its_public_records_are_divided(tmp_path: Path) -> None:
    paths = write(tmp_path / "triage", "classify", records(tmp_path))
    study = load_study(paths[0])
    assert study.objective.labels == tuple(sorted(LABELS)) and study.study.name == "triage"
    assert study.selection and study.evaluation
    counts = [len(t.path.read_text().splitlines()) for t in (study.selection, study.evaluation)]
    assert counts == [30, 60]
    check_selection(study)
    sites = load_sites(tmp_path / "triage" / "sites")
    assert [site.site.declared_size for site in sites] == [350, 350]
    assert {site.data.path for site in sites} == {*records(tmp_path).data}
    assert {p.stat().st_mode & 0o777 for p in paths if p.name == "site.toml"} == {0o600}
    # ε leaves room for rounds that a crash repeats; δ lets no unit out.
    assert study.privacy.epsilon < min(site.policy.max_epsilon for site in sites)
    assert study.privacy.delta <= 1 / (5 * 350) and sites[0].policy.max_delta == study.privacy.delta


@pytest.mark.parametrize(
    ("epsilon", "sites", "size", "best"), [(8, 5, 210, 0.8), (3, 5, 210, 0.4), (1, 5, 210, 0.1)]
)
def test_the_step_follows_the_noise_as_the_measured_ones_did(epsilon, sites, size, best):
    """MTS-Dialog's rates were chosen on validation records, at δ = 1e-3; the rule has δ = 1e-4."""
    own = Records(epsilon=epsilon, size=size, data=tuple(Path(str(n)) for n in range(sites)))
    assert best / 2 < classify.learning_rate(own, 0.9) < best * 2


def test_with_hardly_any_noise_the_step_has_an_end():
    assert classify.learning_rate(Records(epsilon=8.0, size=10**6), 0.9) == classify.LONGEST


def test_few_public_records_all_judge(tmp_path: Path) -> None:
    few = records(tmp_path, evaluation=table(tmp_path / "few.csv", 12))
    study = load_study(write(tmp_path / "own", "classify", few)[0])
    assert study.selection is None and study.evaluation
    assert dict(study.strategy.options) == {"momentum": classify.MOMENTUM}


def test_each_role_gets_its_own_files(tmp_path: Path) -> None:
    for role, names in (("coordinator", {"study.toml", "selection.jsonl", "evaluation.jsonl"}),
                        ("site", {"site.toml"})):  # fmt: skip
        asked = records(tmp_path, role=role, data=())
        paths = write(tmp_path / role, "classify", asked)
        assert {path.name for path in paths} == names


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"evaluation": None}, ConfigError, "the classes are not known"),
        ({"labels": ("heart", "lungs")}, ConfigError, "'skin' is none of --label"),
        ({"target": "desc"}, DataError, "desc"),
        ({"data": (Path("nowhere.csv"),)}, DataError, "no such file"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        write(tmp_path / "own", "classify", records(tmp_path, **changes))
    assert not (tmp_path / "own").exists()


def test_a_study_is_not_written_over(tmp_path: Path) -> None:
    paths = write(tmp_path / "own", "classify", records(tmp_path))
    before = {path: path.read_bytes() for path in paths}
    with pytest.raises(ConfigError, match="exists"):
        write(tmp_path / "own", "classify", records(tmp_path, labels=LABELS))
    assert before == {path: path.read_bytes() for path in paths}


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch) -> None:
    own = records(tmp_path)
    writing, calls = presets.replace, 0

    def full(path: Path, content: bytes, *, private: bool = False) -> Path:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise InfrastructureError(f"{path}: cannot be written (No space left on device)")
        return writing(path, content, private=private)

    monkeypatch.setattr(presets, "replace", full)
    with pytest.raises(InfrastructureError, match="No space left"):
        write(tmp_path / "own", "classify", own)
    assert not [path for path in (tmp_path / "own").rglob("*") if path.is_file()]


def test_the_command_writes_the_same_and_says_what_is_next(tmp_path: Path) -> None:
    own = records(tmp_path)
    arguments = ["init", str(tmp_path / "cli"), "--task", "classify", "--size", "350"]
    arguments += ["--text", "note", "--target", "desk", "--evaluation", str(own.evaluation)]
    result = CliRunner().invoke(app, [*arguments, *(f"--data={path}" for path in own.data)])
    assert result.exit_code == 0, result.output
    assert "fedtune simulate" in result.output and "fedtune predict" in result.output
    written = write(tmp_path / "lib" / "cli", "classify", own)
    assert (tmp_path / "cli/study.toml").read_bytes() == written[0].read_bytes()
    lines = (tmp_path / "cli/evaluation.jsonl").read_text().splitlines()
    assert set(json.loads(lines[0])) == {"note", "desk"}
