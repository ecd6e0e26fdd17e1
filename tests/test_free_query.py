"""Records that a query or a view selects are outside the guarantee, and every output says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.cli.verify import _lines
from fedtune.core.config import load_site, load_study
from fedtune.core.vault.worker import SiteWorker
from fedtune.derive.model_card import privacy_line
from fedtune.evidence.dossier.content import build
from fedtune.evidence.dossier.facts import documents
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.verify import verify
from fedtune.public.start import start
from fedtune.report.declared import declared_in
from fedtune.report.run_files import read_report
from tests import databases
from tests.guarantee.test_wire_inventory import outside, usual_of
from tests.guarantee.world import Recorder, leaves, patients, run
from tests.test_intake import in_database


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recorder:
    return usual_of("causal_lm", tmp_path_factory, tiny_base)


@pytest.mark.parametrize("table", ["data", "evaluation"])
def test_a_site_with_a_query_says_so_in_one_word_and_every_output_of_the_run_does(
    usual: Recorder, tmp_path: Path, tiny_base: Path, table: str
) -> None:
    """`free_query`: what a person configured, there only where it was. The twin: `usual`."""
    made = databases.made("sqlite", tmp_path / "database")
    study = in_database(tmp_path, tiny_base, patients(12), made, "SELECT * FROM note")
    north = tmp_path / "site-north.toml"
    text = north.read_text().replace("[policy]", "[policy]\nallow_free_query = true")
    if table == "evaluation":
        asked = text[text.index("url =") : text.index("[policy]")]
        plain = asked.replace('query = "SELECT * FROM note"', 'table = "note"')
        text = text.replace(asked, f"{plain}[evaluation]\n{asked}")
    north.write_text(text)
    grid = run(study)
    assert outside(grid) == ["admission.free_query: bool"]
    for one, other in zip(usual.replies, grid.replies, strict=True):
        assert {path for path, _ in {*leaves(other)} - {*leaves(one)}} <= {"admission.free_query"}
    folder, words = (
        tmp_path / "run",
        "A query or a view of the database selected the records of north:",
    )
    report = read_report(folder)
    assert report["free_query"] == ["north"] and "declared" not in report
    page = markdown(build(documents(folder), {}))
    assert words in (folder / "report.md").read_text() and words in privacy_line(report)
    assert "Not covered by ε" in page and "a query or a view selects | north |" in page
    assert declared_in([report, {}])["free_query"] == ["north"]
    verified = verify(folder)
    assert verified.free_query == ("north",) and words in _lines(verified)
    plain = read_report(usual.files[0].parent / "run")
    assert "free_query" not in plain and words[:22] not in privacy_line(plain)
    assert "Not covered by ε" not in markdown(build(documents(usual.files[0].parent / "run"), {}))


def test_a_query_that_comes_in_mid_study_waits_for_a_restart(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Else the coordinator would never hear of it."""
    made = databases.made("sqlite", tmp_path / "database")
    study = in_database(tmp_path, tiny_base, patients(12), made)
    north, begun = tmp_path / "site-north.toml", start(load_study(study))
    text = north.read_text().replace("[policy]", "[policy]\nallow_free_query = true")
    north.write_text(text)
    worker = SiteWorker(load_site(north), north)
    assert worker.prepare(begun.study, begun.frozen).admitted
    north.write_text(text.replace('table = "note"', 'query = "SELECT * FROM note"'))
    assert "it did not when the site joined" in worker.prepare(begun.study, begun.frozen).reason
    again = SiteWorker(load_site(north), north).prepare(begun.study, begun.frozen)
    assert again.admitted and again.free_query
