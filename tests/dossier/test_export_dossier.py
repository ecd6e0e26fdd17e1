"""A model that is made of a run in a dossier carries the dossier on; what is made of several runs
has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import ConfigError
from fedtune.evidence.dossier.release import release
from fedtune.evidence.verify import verify
from tests.cli_kit import run as command


def test_an_exported_model_carries_its_dossier_and_its_card_points_to_it(
    released: Any, tmp_path: Path
) -> None:
    folder, _ = released
    done = command("export", folder, "--out", tmp_path / "model")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "model" / "README.md").read_text()
    assert "dossier/" in card and "fedtune verify dossier --trust" in card
    assert verify(tmp_path / "model" / "dossier") == verify(folder)
    assert verify(tmp_path / "model").exported
    plain = command("export", folder / "run", "--out", tmp_path / "other")
    assert plain.exit_code == 0 and (tmp_path / "other" / "dossier").is_dir()
    alone = shutil.copytree(folder / "run", tmp_path / "alone", symlinks=True)
    assert command("export", alone, "--out", tmp_path / "bare").exit_code == 0
    assert not (tmp_path / "bare" / "dossier").exists(), "the twin: a run that lies in none"
    assert "dossier/" not in (tmp_path / "bare" / "README.md").read_text()


def test_of_a_dossier_that_does_not_verify_nothing_is_exported(
    released: Any, tmp_path: Path
) -> None:
    """Though the run inside does."""
    copy = shutil.copytree(released[0], tmp_path / "dossier", symlinks=True)
    page = copy / "dossier.md"
    page.write_text(page.read_text().replace("TO BE FILLED", "FILLED"))
    assert verify(copy / "run").updates
    done = command("export", copy, "--out", tmp_path / "model")
    assert done.exit_code == 2 and "dossier.md" in done.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", ["merge", "derived"])
def test_what_is_made_of_other_runs_is_refused_with_their_names(
    signed: Any, tmp_path: Path, how: str
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    report = json.loads((signed[0] / "report.json").read_text())
    key = "study" if how == "merge" else "name"
    parents = [{key: "fever"}, {key: "cough"}]
    (made / "report.json").write_text(json.dumps(report | {how: {"parents": parents}}))
    with pytest.raises(ConfigError, match=r"made of other runs \(fever, cough\)") as refused:
        release(made, tmp_path / "out")
    assert "release each of those runs" in refused.value.todo
