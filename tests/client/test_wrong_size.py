"""A declared size that is far from the records' own number is told to the person at the site, and
to nobody else."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.officer import wrong_size as module
from fedtune.officer.before_joining import check_records
from fedtune.officer.wrong_size import find_wrong_size
from tests.cli_kit import run
from tests.client.adoption_kit import make_site, write_notes


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """12 are declared, and there are 40 patients."""
    write_notes(tmp_path / "notes.jsonl", [f"p{number}" for number in range(40)])
    return make_site(tmp_path, "north")


def test_it_is_said_of_the_units_that_the_plan_protects(site: Path) -> None:
    said = find_wrong_size(load_site(site), "patient")
    assert said.startswith("WARNING") and "40 patients" in said
    assert "40 records" in find_wrong_size(load_site(site), "record")
    site.write_text(site.read_text().replace("declared_size = 12", "declared_size = 40"))
    assert find_wrong_size(load_site(site), "patient") == ""


def test_records_that_take_long_to_read_are_not_counted(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("they were read")

    monkeypatch.setattr(module, "read_records", read)
    text = site.read_text()
    site.write_text(text.replace('completion = "answer"', 'completion = "answer", image = "note"'))
    assert find_wrong_size(load_site(site), "patient") == ""


def test_a_start_warns_of_it_and_joins(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_records(load_site(site))
    assert "40 patients" in caplog.text


def test_a_review_says_it_on_the_screen_alone(site: Path, tmp_path: Path, study: Path) -> None:
    """It is in no file at the site, and so in nothing that a coordinator is sent. Twin: with the
    right size nothing is said."""
    done = run("review", study, "--site", site, "--json")
    assert "40 " in json.loads(done.stdout)["declared_far"], done.output
    assert "there are 40" in " ".join(done.stderr.split())
    kept = [path for path in (tmp_path / "north-state").rglob("*") if path.is_file()]
    assert not any(b"there are 40" in path.read_bytes() for path in kept)
    site.write_text(site.read_text().replace("declared_size = 12", "declared_size = 40"))
    done = run("review", study, "--site", site, "--json")
    assert json.loads(done.stdout)["declared_far"] == "" and "there are" not in done.stderr
