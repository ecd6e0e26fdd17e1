"""A continuous study's report has one public set for base and version, also after a rollback."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Columns, PublicTable, StartTable
from fedtune.core.files.reading import fingerprint
from fedtune.evaluation.run import evaluate
from fedtune.runs.run import Run
from fedtune.server import version_report
from fedtune.server.versions import Versions
from tests.cli_kit import run as command
from tests.continuous.fakes import Judge, continuous, go, loss, parts, sites
from tests.server.fakes import zeros
from tests.simulated import simulate
from tests.test_end_to_end import lay_out

ROOT = Path(__file__).parents[2]
PRIVACY = '{ epsilon = 8.0, noise_multiplier = 2.0, delta = 1e-3, unit = "patient" }'


def report(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "report.json").read_text())
    return body


def test_base_and_version_are_compared_on_the_records_in_use(trial: Any) -> None:
    """The public file is replaced after round 3: the base has another figure on the new one."""

    class Public(Judge):
        """What the base alone has on it follows from the file."""

        def __init__(self, base: float) -> None:
            self.base = base

        def measure(self, adapter: Any) -> dict[str, float]:
            return {"loss": self.base} if adapter is None else {"loss": loss(adapter)}

    made = trial(*sites())
    bodies = [
        go(
            made,
            upto,
            evaluator=lambda study, frozen, base=base: Public(base),
            fingerprint=lambda path, name=name: name,
        )
        for upto, base, name in ((3, 9.0, "a" * 64), (6, 5.0, "b" * 64))
    ]
    for body, base, name in zip(bodies, (9.0, 5.0), "ab", strict=True):
        quality = body["quality"]
        assert quality["before"] == {"loss": base} and quality["public"] == name * 64
        assert quality["columns"] == [
            "base alone",
            f"version {body['continuous']['version in use']}, in use",
        ]
        assert "gain" in quality


@pytest.mark.parametrize("start", [StartTable(steps=1), None])
def test_the_version_in_use_is_compared_with_the_public_start(
    trial: Any, start: StartTable | None
) -> None:
    class Public(Judge):
        def gain(self, adapter: Any, start: Any = None) -> dict[str, Any]:
            over = {"over_start": [loss(adapter) - loss(start)] * 2} if start else {}
            return super().gain(adapter) | over

    columns = Columns(prompt="p", completion="c")
    public = PublicTable(path=Path("public.jsonl"), licence="CC0-1.0", columns=columns)
    study = continuous().model_copy(update={"start": start, "public": public})
    settings = parts(3, evaluator=lambda study, frozen: Public())
    quality = trial(*sites()).run(study, resume=True, parts=settings)["quality"]
    assert ("start" in quality) is ("over_start" in quality["gain"]) is bool(start)
    if start:
        assert quality["start"] == {"loss": loss(zeros())}
        assert quality["gain"]["over_start"] == [quality["after"]["loss"] - loss(zeros())] * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A study with a [schedule] of three rounds, whose later versions are all released."""
    folder = tmp_path_factory.mktemp("continuous")
    path = lay_out(folder, tiny_base, PRIVACY)
    text = path.read_text().replace("rounds = 3\n", "")
    path.write_text(text + '[schedule]\nevery = "1h"\nalpha = 0.5\nlooks = 2\n')
    simulate(path, sorted(folder.glob("site-*.toml")), folder / "run", rounds=3)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy, with the public file that a copy's plan looks for inside it."""
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    shutil.copy(finished / "test.jsonl", tmp_path / "run")
    return tmp_path / "run"


def test_the_page_says_how_to_check_which_records_were_in_use(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "continuous.md").read_text()
    (shown,) = (line for line in page.splitlines() if "sha256sum" in line)
    file = tmp_path / "public.jsonl"
    file.write_text('{"text": "hot", "label": "fever"}\n')
    on = version_report.figures(1, fingerprint(file))["on"]
    done = subprocess.run(["sh", "-c", shown], cwd=tmp_path, capture_output=True, text=True)
    assert on == f"the public records in use (fingerprint {done.stdout[:8]})", done.stderr
    assert version_report.figures(1, "")["on"] == "the public records"


def another(run: Path) -> int:
    """A version that can be chosen, and is not in use."""
    index = Versions(run).index()
    assert index is not None
    found = [number for number in index.rollback_targets if number != index.champion]
    if not found:
        pytest.fail("no version was released")
    return found[0]


def test_after_a_rollback_the_report_is_of_the_version_in_use(
    finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    stale, number = report(run), another(run)
    done = command("versions", run, "--rollback", number)
    assert done.exit_code == 0, done.output
    body = report(run)
    assert body["continuous"]["version in use"] == number != stale["continuous"]["version in use"]
    assert body["continuous"]["chosen by a person"] is True
    expected = evaluate(Run(run), finished / "test.jsonl")
    for name in ("before", "after"):
        assert body["quality"][name] == pytest.approx(expected[name])
    assert body["quality"]["before"] == pytest.approx(stale["quality"]["before"])
    assert body["quality"]["after"] != pytest.approx(stale["quality"]["after"])
    assert f"version {number}, in use" in (run / "report.md").read_text()
    assert body["privacy"] == stale["privacy"]

    command("versions", run, "--unpin")
    assert report(run)["continuous"]["chosen by a person"] is False
    assert report(run)["quality"] == body["quality"]


def test_a_version_that_cannot_be_measured_has_no_figure(finished: Path, tmp_path: Path) -> None:
    """The rollback stands, and no other version's figure is left in its place."""
    run = copied(finished, tmp_path)
    number = another(run)
    (run / "test.jsonl").unlink()
    done = command("versions", run, "--rollback", number)
    assert done.exit_code == 0 and "report.md has no figure of this version" in done.output
    body = report(run)
    assert body["continuous"]["version in use"] == number
    assert body["quality"]["after"] == {} and "gain" not in body["quality"]
    assert version_report.NOT_MEASURED in (run / "report.md").read_text()
