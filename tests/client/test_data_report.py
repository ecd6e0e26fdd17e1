"""What a site is told of its own files: every row accounted for, no cell shown, nothing sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import fedtune
from fedtune.cli.main import app
from fedtune.core.config import load_site, load_study
from fedtune.core.config.state_files import COUNTS
from fedtune.core.errors import DataError
from fedtune.core.vault.worker import SiteWorker
from fedtune.observe import OnEvent, observer
from fedtune.observe.log import LOGGABLE, SCREEN
from fedtune.officer.doctor import examine
from fedtune.officer.site_files import sites_in
from fedtune.public.start import start
from tests.guarantee.world import lay_out, patients
from tests.simulated import simulate

pytestmark = pytest.mark.usefixtures("without_self_test")

SECRET = "Zaphod-Beeblebrox-1979"
LONG = "cough and fever, " * 60
SITE = """
[site]
name = "north"
declared_size = {declared}
[data]
path = "{file}"
{more}
columns = {{ {columns} }}
[policy]
bases = "any"
"""


def site_of(folder: Path, file: str, columns: str, declared: int = 20, more: str = "") -> Path:
    path = folder / "site.toml"
    path.write_text(SITE.format(file=file, columns=columns, declared=declared, more=more))
    return path


@pytest.fixture
def classified(tmp_path: Path) -> Path:
    """20 patients of 3 records; a doubled row, rows that cannot be used, a label nobody knows."""
    lines = ["note;label;who;day"]
    for n in range(60):
        label = " cardio" if n % 3 else "neuro"
        lines.append(f"{SECRET} note {n};{label};{n % 20};202{n % 2}-03-04")
    lines += [lines[1], f";cardio;{SECRET};", f"{SECRET};neuro", f"{SECRET} x;{SECRET};3;"]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    more = 'source = "csv"\noptions = { delimiter = ";" }'
    columns = 'text = "note", label = "label", patient = "who"'
    return site_of(tmp_path, "data.csv", columns, more=more)


def test_every_row_is_accounted_for_and_no_cell_is_shown(classified: Path) -> None:
    report = fedtune.data_report(load_site(classified), date="day")
    assert (report.rows, report.usable, report.units, report.duplicates) == (64, 62, 20, 1)
    assert report.rejected == {"empty text": 1, "wrong column count": 1}
    assert [tuple(failed) for failed in report.failed] == [
        ("data.csv", 63, "empty text"),
        ("data.csv", 64, "wrong column count"),
    ]
    assert report.columns == ["note", "label", "who", "day"]
    assert report.classes == {
        "cardio": 40,
        "neuro": 21,
        "": 1,
    }  # a value of one record is not shown
    assert report.years == {"2020": 31, "2021": 30, "no date": 3}
    assert str(report.per_patient).startswith("3 at least")
    (file,) = report.files
    assert (file.encoding, file.delimiter, file.rows, file.failed) == ("UTF-8", "semicolon", 64, 2)
    for text in (str(report), json.dumps(report.as_dict())):
        assert SECRET not in text and "cardio" in text


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_private_loads_nothing_and_escapes_what_files_are_called(
    tmp_path: Path,
) -> None:
    evil = "<script>alert(1)</script>"
    (tmp_path / "data.jsonl").write_text(json.dumps({"t": "x", evil: "y"}) + "\n")
    site = load_site(site_of(tmp_path, "data.jsonl", 'text = "t"'))
    page = fedtune.data_report(site).save(tmp_path / "report.html")
    text = page.read_text()
    assert page.stat().st_mode & 0o777 == 0o600
    assert evil not in text and "&lt;script&gt;" in text
    tags = Tags()
    tags.feed(text)
    assert {tag for tag, _ in tags.found}.isdisjoint({"script", "link", "img", "iframe", "a"})
    assert not any({"src", "href", "onload"} & set(attributes) for _, attributes in tags.found)
    assert text.index("must not leave the site") < text.index("<h1>")


def test_the_command_prints_tables_json_and_a_page(
    classified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, ["data", "report", str(classified)])
    assert shown.exit_code == 0 and SECRET not in shown.output
    for words in ("semicolon", "wrong column count", "cardio", "private to this site"):
        assert words in shown.output
    as_json = CliRunner().invoke(app, ["data", "report", str(classified), "--json"])
    assert json.loads(as_json.output)["rows"] == 64
    assert sorted(tmp_path.rglob("*")) == before  # no ledger, no cache, nothing
    html = tmp_path / "page.html"
    CliRunner().invoke(app, ["data", "report", str(classified), "--html", str(html)])
    assert SECRET not in html.read_text() and "cardio" in html.read_text()


def test_a_file_of_which_no_row_is_used_is_listed(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for ward in ("a", "b"):
        rows = [json.dumps({"t": "x", "ward": ward})] * 3
        (tmp_path / "notes" / f"{ward}.jsonl").write_text("\n".join(rows) + "\n")
    site = site_of(tmp_path, "notes", 'text = "t"', more='filter = { ward = "a" }')
    files = fedtune.data_report(load_site(site)).files
    assert [(file.name, file.rows) for file in files] == [("a.jsonl", 3), ("b.jsonl", 3)]


def test_a_column_of_text_is_not_shown_as_classes(tmp_path: Path) -> None:
    rows = [{"t": "x", "l": f"{SECRET} {n}"} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site = load_site(site_of(tmp_path, "data.jsonl", 'text = "t", label = "l"'))
    assert fedtune.data_report(site).classes == {"": 60}


def test_a_wrong_file_is_a_problem_that_the_report_names(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(f"note;label\n{SECRET};a\n")
    report = fedtune.data_report(load_site(site_of(tmp_path, "data.csv", 'text = "note"')))
    assert "a semicolon" in report.problem and "PROBLEM" in str(report)
    assert report.columns == ["note", "label"] and SECRET not in str(report)
    with pytest.raises(DataError, match="no such file"):
        fedtune.data_report(load_site(site_of(tmp_path, "none.csv", 'text = "note"')))


def test_a_file_that_rows_of_two_patients_name_is_a_warning(tmp_path: Path) -> None:
    for n in range(3):
        Image.new("RGB", (16, 16), (80 * n, 0, 0)).save(tmp_path / f"scan-{n}.png")
    rows = [("ann", "scan-0.png"), ("ann", "scan-0.png"), ("bob", "scan-1.png")]
    columns = 'image = "scan", label = "label", patient = "who"'

    def report(*more: tuple[str, str]) -> fedtune.DataReport:
        lines = [f"{who},{scan},yes" for who, scan in (*rows, *more)]
        (tmp_path / "data.csv").write_text("who,scan,label\n" + "\n".join(lines) + "\n")
        return fedtune.data_report(load_site(site_of(tmp_path, "data.csv", columns)))

    own = report(("cid", "scan-2.png"))
    assert (own.shared.count, own.shared.rows) == (0, [])
    assert "named by" not in str(own)
    found = report(("cid", "./scan-1.png"), ("cid", "scan-2.png"))
    reason = "names a file that another patient's row names"
    assert [tuple(row) for row in found.shared.rows] == [
        ("data.csv", 4, reason),
        ("data.csv", 5, reason),
    ]
    assert "WARNING  1 file is named by rows of two or more patients" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["shared"]["rows"][0]["row"] == 4
    assert "scan-1" not in str(found) and "bob" not in str(found)
    findings = {f.name: f for f in examine(tmp_path / "site.toml")}
    assert f"data.csv row 4, 5 ({reason})" in findings["records"].says


# ------------------------------------------------------------------------------- with a study

STUDY = """
[study]
name = "rows"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
last_layers = 1
[objective]
name = "causal_lm"
max_length = 48
overflow = "truncate"
[training]
rounds = 1
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
[privacy]
noise_multiplier = 2.0
delta = 1e-3
unit = "patient"
max_records_per_unit = 2
"""


@pytest.fixture
def studied(tmp_path: Path, tiny_base: Path) -> Iterator[tuple[Path, Path]]:
    rows: list[Any] = [
        {"q": f"{SECRET} {n} " + (LONG if n % 4 == 0 else ""), "a": " yes", "who": n % 12}
        for n in range(36)
    ]
    rows += [{"q": f"{SECRET} is it?", "a": LONG, "who": 1}, {"q": "", "a": SECRET, "who": 2}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "study.toml").write_text(STUDY.format(base=tiny_base))
    columns = 'prompt = "q", completion = "a", patient = "who"'
    yield site_of(tmp_path, "data.jsonl", columns, 40), tmp_path / "study.toml"


REJECTED = {"answer too long": 1, "empty text": 1}


def test_what_a_study_makes_of_the_rows_is_what_trains(
    studied: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site, study = load_site(studied[0]), start(load_study(studied[1]))
    report = fedtune.data_report(site, study.study)
    fit = report.fit
    assert fit is not None and not fit.problem
    assert (fit.train, fit.units, fit.over_cap, fit.rejected) == (24, 12, 12, REJECTED)
    assert fit.too_long == 10 and fit.lengths and fit.lengths.largest > 48
    assert {tuple(failed) for failed in report.failed} == {
        ("data.jsonl", 37, "answer too long"),
        ("data.jsonl", 38, "empty text"),
    }
    worker = SiteWorker(site)
    worker.prepare(study.study, study.frozen)
    worker.train(study.study.digest, 1, study.adapter)  # which reads the records
    kept = json.loads((site.site.state / COUNTS).read_text())["records"]
    assert (site.site.state / COUNTS).stat().st_mode & 0o777 == 0o600
    assert (kept["rows"], kept["train"], kept["units"]) == (38, fit.train, fit.units)
    assert (kept["cut"], kept["over_cap"]) == (fit.cut, fit.over_cap)
    assert kept["rejected"] == fit.rejected and fit.cut > 0
    assert "24 of 38 rows train of 12 patients" in caplog.text
    assert "site.declared_size = 40 and there are 12 patients" in caplog.text
    assert SECRET not in caplog.text + (site.site.state / COUNTS).read_text() + str(report)


def test_the_command_takes_a_study_as_it_was_written(studied: tuple[Path, Path]) -> None:
    arguments = ["data", "report", str(studied[0]), "--study", str(studied[1]), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    fit = json.loads(done.output)["fit"]
    assert fit["train"] == 24 and fit["rejected"] == REJECTED
    assert not (studied[0].parent / "state").exists()


def test_the_doctor_lists_the_rows(studied: tuple[Path, Path]) -> None:
    findings = {f.name: f for f in examine(studied[0], start(load_study(studied[1])).study)}
    says = findings["records for the plan"].says
    assert "data.jsonl row 37 (answer too long)" in says
    assert "data.jsonl row 38 (empty text)" in says
    assert "12 over max_records_per_unit = 2" in says and SECRET not in says
    assert "data.jsonl row 38 (empty text)" in findings["records"].says


# ------------------------------------------------------------------------- screen, and no other


def test_simulate_says_what_trains_on_the_screen_alone(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12), patients(11))
    seen: list[tuple[str, dict[str, Any]]] = []
    out = tmp_path / "run"
    watch: OnEvent = lambda event, data: seen.append((event, data))  # noqa: E731
    with observer("coordinator", out, then=watch) as events:
        simulate(study, sites_in(tmp_path), out, on_event=events)
    lines = [data["text"] for event, data in seen if event == "records"]
    assert len(lines) == 2 and all("rows train of 1" in line for line in lines)
    first = next(n for n, (event, _) in enumerate(seen) if event == "start")
    assert [event for event, _ in seen].index("records") < first
    for path in out.rglob("*"):
        assert path.is_dir() or b"rows train" not in path.read_bytes()
    assert {"begin", "records", "step"} == SCREEN and "records" not in LOGGABLE
