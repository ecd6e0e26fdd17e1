"""`fedtune init --task`: a study of one's own files that works without an edit."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click import testing
from click.testing import Result
from typer.testing import CliRunner

from fedtune import presets
from fedtune.cli.main import app
from fedtune.core.config import load_site, load_study
from fedtune.core.data.files import rows as data_rows
from fedtune.core.data.records import source_of
from fedtune.core.data.sources.csv import Csv, guess_format
from fedtune.core.errors import ConfigError, DataError, InfrastructureError
from fedtune.evaluation.selection import check_apart
from fedtune.flower import enrol
from fedtune.officer.site_files import load_sites
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
    assert study.public and study.selection and study.evaluation
    tables = (study.public, study.selection, study.evaluation)
    assert [len(t.path.read_text().splitlines()) for t in tables] == [36, 18, 36]
    assert study.start and study.start.head == "public"
    check_apart(study)
    sites = load_sites(tmp_path / "triage" / "sites")
    assert [site.site.declared_size for site in sites] == [350, 350]
    assert {site.data.path for site in sites} == {*records(tmp_path).data}
    assert {p.stat().st_mode & 0o777 for p in paths if p.name == "site.toml"} == {0o600}
    assert (  # δ lets no unit out
        study.privacy.delta <= 1 / (10 * 350) and sites[0].policy.max_delta == study.privacy.delta
    )


@pytest.mark.parametrize(
    ("epsilon", "sites", "size", "best"), [(8, 5, 210, 0.8), (3, 5, 210, 0.4), (1, 5, 210, 0.1)]
)
def test_the_step_follows_the_noise_as_the_measured_ones_did(epsilon, sites, size, best):
    """MTS-Dialog's rates were chosen on validation records, at δ = 1e-3; the rule has δ = 1e-4."""
    own = Records(epsilon=epsilon, size=size, data=tuple(Path(str(n)) for n in range(sites)))
    assert best / 2 < classify.learning_rate(own, 0.9) < best * 2


def test_each_site_may_declare_a_size_of_its_own(tmp_path: Path) -> None:
    own = records(tmp_path, sizes=(30, 60), size=30)
    write(tmp_path / "own", "classify", own)
    sites = load_sites(tmp_path / "own" / "sites")
    assert sorted(site.site.declared_size for site in sites) == [30, 60]
    assert load_study(tmp_path / "own" / "study.toml").privacy.delta == 1e-3  # of the largest
    alike = records(tmp_path, size=45)
    rates = [
        classify.learning_rate(presets.complete_records("classify", each), 0.9)
        for each in (own, alike)
    ]
    assert rates[0] == rates[1]  # by the sum
    with pytest.raises(ConfigError, match="3 sizes for 2 sites"):
        write(tmp_path / "other", "classify", records(tmp_path, sizes=(30, 60, 90)))
    arguments = ["init", tmp_path / "cli", "--task", "classify", "--size", 30, "--size", 60]
    arguments += ["--text", "note", "--target", "desk", "--evaluation", own.evaluation]
    done = cli(*arguments, *(word for path in own.data for word in ("--data", path)))
    assert done.exit_code == 0, done.output
    assert "declares" not in done.output.replace(
        "Süd & Co.csv: 30 records, and the site declares", ""
    )


def test_a_size_that_is_far_off_is_said_and_by_a_factor_of_two_warned_of(tmp_path: Path) -> None:
    near, off, far = (
        presets.notes("classify", records(tmp_path, size=size)) for size in (32, 40, 60)
    )
    assert "declares" not in near
    assert "north.csv: 30 records, and the site declares 40" in off and "WARNING" not in off
    assert "WARNING: north.csv: 30 records, and the site declares 60" in far


def test_classes_that_only_the_sites_have_are_named_and_taken_in(tmp_path: Path) -> None:
    own = records(tmp_path)
    few = tmp_path / "few.csv"
    few.write_text(own.evaluation.read_text().replace("skin", "heart"))
    given = replace(own, evaluation=few)
    told = presets.notes("classify", given)
    assert "classes: 2 (heart, lungs)" in told and '--also-label "skin"' in told
    also = replace(given, also_labels=("skin",))
    told = presets.notes("classify", also)
    assert "classes: 3 (heart, lungs, skin)\n" in told and "left out" not in told
    assert "of 1 of these classes there is no public record" in told
    assert "judges them: skin\n" in told
    study = load_study(write(tmp_path / "own", "classify", also)[0])
    assert study.objective.labels == ("heart", "lungs", "skin")


@pytest.mark.parametrize("task", presets.TASKS)
def test_what_a_plan_reads_is_what_its_task_says(task: str) -> None:
    source = Path(presets.TASKS[task].__file__).read_text()
    (most,) = {*re.findall(r"^max_length = (\d+)", source, re.MULTILINE)}
    assert int(most) == presets.TASKS[task].MAX_LENGTH and presets.TASKS[task].CUT


def test_how_much_of_long_texts_is_read_is_said(tmp_path: Path) -> None:
    def file(words: int) -> Path:
        path = tmp_path / f"{words}.jsonl"
        row = {"instruction": "word " * words, "response": "so"}
        path.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(30)))
        return path

    public = file(40)
    short, long, longest = (
        presets.notes("instruct", Records(data=(file(n),), evaluation=public, size=30))
        for n in (50, 400, 2000)
    )
    assert "reads" not in short
    assert "400.jsonl: a median record has about 500 tokens, of which the plan reads 384" in long
    assert "(77%); a longer instruction loses its start" in long and "WARNING" not in long
    assert "WARNING: 2000.jsonl" in longest and "Raise objective.max_length" in longest


def test_with_hardly_any_noise_the_step_has_an_end():
    assert classify.learning_rate(Records(epsilon=8.0, size=10**6), 0.9) == classify.LONGEST


def test_a_spreadsheet_of_semicolons_needs_no_word(tmp_path: Path) -> None:
    """Both a site's file and the public one, as they are written in much of Europe."""
    rows = [f'"{n}";"Ödem {n}, ""links""";"{LABELS[n % 3]}"\r\n' for n in range(90)]
    head = '"id";"note";"desk"\r\n'
    (tmp_path / "nord.csv").write_bytes((head + "".join(rows[:45])).encode("cp1252"))
    (tmp_path / "offen.csv").write_bytes(("\ufeff" + head + "".join(rows[45:])).encode())
    given = records(tmp_path, data=(tmp_path / "nord.csv",))
    given = replace(given, evaluation=tmp_path / "offen.csv")
    told = presets.notes("classify", given)
    assert "nord.csv: read as CSV with a semicolon between cells and cp1252\n" in told
    assert "offen.csv: read as CSV with a semicolon between cells\n" in told
    assert "public: 45 of 45 records" in told
    write(tmp_path / "own", "classify", given)
    site = load_site(*(tmp_path / "own").rglob("site.toml"))
    assert site.data.source == "csv"
    assert site.data.options == {"delimiter": ";", "encoding": "cp1252"}
    found = [*data_rows(site.data.path, {}, source=source_of(site.data))]
    assert len(found) == 45 and found[0] == {"id": "0", "note": 'Ödem 0, "links"', "desk": "heart"}
    # As usual: no option, and nothing is said.
    assert "read as CSV" not in presets.notes("classify", records(tmp_path))
    assert guess_format(table(tmp_path / "usual.csv", 3), ["note"]) is None
    assert guess_format(tmp_path / "none.csv", ["note"]) is None
    assert guess_format(tmp_path / "nord.csv", ["another"]) == Csv(encoding="cp1252")


def test_few_public_records_all_judge(tmp_path: Path) -> None:
    few = records(tmp_path, evaluation=table(tmp_path / "few.csv", 12))
    study = load_study(write(tmp_path / "own", "classify", few)[0])
    assert study.selection is None and study.evaluation
    assert study.start and study.start.head == "labels"  # nothing to learn from
    assert dict(study.strategy.options) == {"momentum": classify.MOMENTUM}


def test_each_role_gets_its_own_files(tmp_path: Path) -> None:
    public = {"public.jsonl", "selection.jsonl", "evaluation.jsonl"}
    for role, names in (("coordinator", {"study.toml", *public}), ("site", {"site.toml"})):
        asked = records(tmp_path, role=role, data=())
        paths = write(tmp_path / role, "classify", asked)
        assert {path.name for path in paths} == names


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"evaluation": None}, ConfigError, "the classes are not known"),
        ({"labels": ("heart", "lungs")}, ConfigError, "'skin' is not one of --label"),
        ({"target": "desc"}, DataError, "desc"),
        ({"data": (Path("nowhere.csv"),)}, DataError, "no such file"),
        ({"data": ("evaluation",)}, ConfigError, "and as public records"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        own = records(tmp_path, **changes)
        if own.data == ("evaluation",):
            own = replace(own, data=(own.evaluation,))
        write(tmp_path / "own", "classify", own)
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


def cli(*words: object, typed: str = "") -> Result:
    """As on a terminal where something is typed; else in a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        if typed:
            patch.setattr(testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
        return CliRunner().invoke(app, [str(word) for word in words], input=typed or None)


def test_on_a_terminal_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    own = records(tmp_path)
    at = tmp_path / "asked"
    typed = f"note\ndesk\n350\n{own.evaluation}\n{own.data[0]}, {own.data[1]}\n"
    done = cli("init", at, "--task", "classify", typed=typed)
    assert done.exit_code == 0, done.output
    assert load_study(at / "study.toml").objective.labels == tuple(sorted(LABELS))
    assert [s.data.path for s in load_sites(at / "sites")] == sorted(own.data)
    assert {s.site.declared_size for s in load_sites(at / "sites")} == {350}
    hub = tmp_path / "hub"
    done = cli("init", hub, "--task", "classify", "--role", "coordinator",
               typed="note\ndesk\n350\n\nheart, lungs ,skin\n4\n")  # fmt: skip
    assert done.exit_code == 0, done.output
    study = load_study(hub / "study.toml")
    assert study.objective.labels == LABELS and study.strategy.min_sites == 4
    north = tmp_path / "north"
    done = cli("init", north, "--task", "classify", "--role", "site", typed="\n\n\n\n")
    assert done.exit_code == 0, done.output
    site = load_sites(north)[0]
    assert site.site.name == "north" and site.data.path == north / "data.jsonl"


def test_in_a_pipe_nothing_is_asked_and_what_is_missing_is_named(tmp_path: Path) -> None:
    done = cli("init", tmp_path / "own", "--task", "classify")
    assert done.exit_code == 2 and "the classes are not known" in done.stderr
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("task", [(), ("--task", "classify", "--label", "a", "--label", "b")])
def test_as_many_sites_are_laid_out_as_were_asked_for(
    tmp_path: Path, task: tuple[str, ...]
) -> None:
    done = cli("init", tmp_path / "own", *task, "--sites", "3")
    assert done.exit_code == 0, done.output
    sites = load_sites(tmp_path / "own" / "sites")
    assert [site.site.name for site in sites] == ["site-1", "site-2", "site-3"]
    assert len({site.data.path for site in sites}) == 3
    assert f"--sites {tmp_path / 'own'}/sites" in done.output
    hub = cli("init", tmp_path / "hub", *task, "--sites", "3", "--role", "coordinator")
    assert hub.exit_code == 0 and not list((tmp_path / "hub").rglob("site.toml"))
    assert load_study(tmp_path / "hub" / "study.toml").strategy.min_sites == 3
    one = cli("init", tmp_path / "west", *task, "--role", "site")
    assert one.exit_code == 0 and {p.name for p in (tmp_path / "west").iterdir()} == {"site.toml"}
    assert load_sites(tmp_path / "west")[0].site.name == "west"


def test_a_site_begins_with_one_command(tmp_path: Path) -> None:
    """Its file, its keys and its request; the private ones stay at it, for it alone."""
    own = table(tmp_path / "west.csv", 30)
    words = ("init", tmp_path / "own", "--task", "classify", "--role", "site", "--data", own)
    words += ("--text", "note", "--target", "desk")
    done = cli(*words, "--name", "west", "--enroll")
    assert done.exit_code == 0, done.output
    request = enrol.read_request(tmp_path / "own" / "west.request")
    assert request.name == "west" and request.fingerprint in done.output
    site = load_sites(tmp_path / "own")[0]
    assert site.data.path == own and (site.site.state / "keys" / "tls.key").is_file()


def test_what_is_lost_of_public_records_is_said(tmp_path: Path) -> None:
    """Rows in another encoding, and a class that only they have; each row once."""
    public = table(tmp_path / "public.csv", 60)
    text = public.read_text().replace("lungs", "Füße")
    western = (text + '7,"note 7, ""quoted""\nsecond line",lungs\n').encode("latin-1")
    public.write_bytes(western + "8,größer,heart\n".encode())  # of two encodings
    words = ("--task", "classify", "--text", "note", "--target", "desk", "--evaluation", public)
    done = cli("init", tmp_path / "own", *words, "--role", "coordinator", "--sites", "2")
    assert done.exit_code == 0, done.output
    assert "public: 42 of 62 records of public.csv; left out: 20 not UTF-8" in done.output
    assert "classes: 3 (heart, lungs, skin)" in done.output
    public.write_bytes(western)
    done = cli("init", tmp_path / "all", *words, "--role", "coordinator", "--sites", "2")
    assert "public: 61 of 61 records of public.csv" in done.output
    assert "classes: 4 (Füße, heart, lungs, skin)" in done.output


@pytest.mark.parametrize("content", ["", "id,note,desk\n"])
def test_a_site_file_without_records_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.csv").write_text(content)
    words = ("--task", "classify", "--label=a", "--label=b", "--text", "note", "--target", "desk")
    done = cli("init", tmp_path / "own", *words, "--data", tmp_path / "empty.csv")
    assert done.exit_code == 2 and "empty.csv: no records" in done.stderr, done.output
    assert not (tmp_path / "own").exists()


def test_a_site_is_told_whom_the_study_protects(tmp_path: Path) -> None:
    words = ("--task", "classify", "--role", "site", "--text", "note", "--target", "desk")
    own = table(tmp_path / "west.csv", 30)
    done = cli("init", tmp_path / "west", *words, "--data", own, "--enroll")
    assert "protected: a record, each by itself" in done.output
    assert done.output.index("protected") < done.output.index("fingerprint")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--role", "site", "--name", "a b"), "not a valid site name"),
        (("--role", "site", "--name", '"]\n[policy]'), "not a valid site name"),
        (("--enroll",), "is for a site"),
        (("--serve", "a"), "for a coordinator with a recipe"),
        (("--task", "classify", "--role", "site", "--serve", "a"), "for a coordinator"),
        (("--task", "classify", "--role", "coordinator", "--serve", "a b"), "no address"),
        (("--task", "classify", "--role", "coordinator", "--serve", "a:0"), "no address"),
        (("--role", "coordinator", "--name", "north"), "is for a site"),
        (("--task", "classify", "--label=a", "--label=b", "--data=x", "--data=y", "--sites=3"),
         "2 files of records for 3 sites"),
        (("--task", "classify", "--role", "site", "--data=x", "--data=y"), "for 1 site"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    done = cli("init", tmp_path / "own", *words)
    assert done.exit_code == 2 and says in done.stderr, done.output
    assert not (tmp_path / "own").exists()


def test_every_study_of_a_file_pays_from_one_ledger(tmp_path: Path) -> None:
    own = records(tmp_path)
    first, second = (
        load_sites(write(tmp_path / name, "classify", own)[-1].parents[1]) for name in ("a", "b")
    )
    assert [site.site.state for site in first] == [site.site.state for site in second]
    assert len({site.site.state for site in first}) == len(first) == 2
    alone = write(tmp_path / "c", "classify", replace(own, role="site", data=own.data[:1]))
    assert load_site(alone[0]).site.state in {site.site.state for site in first}
    folder = tmp_path / "records"
    folder.mkdir()
    table(folder / "one.csv", 30)
    state = load_site(
        write(tmp_path / "d", "classify", replace(own, role="site", data=(folder,)))[0]
    )
    assert folder not in state.site.state.parents  # nor among the records that are read


def test_classes_that_the_study_has_not_are_said_at_once(tmp_path: Path) -> None:
    """On the screen of whoever has the records; in no file that is written."""
    own = records(tmp_path)
    with own.data[0].open("a", encoding="utf-8") as file:
        file.write("30,a,Eyes\n31,b, eyes \n32,c,eyes\n33,d,\n34,e,lungs \n")
    line = "north.csv: 3 of 35 records are of a class that the study has not, and will be left out"
    columns = ["--text=note", "--target=desk"]

    def said(name: str, *more: object) -> str:
        asked = ["init", str(tmp_path / name), "--task=classify", *columns, *map(str, more)]
        found = CliRunner().invoke(app, asked)
        assert found.exit_code == 0, found.output
        return found.output

    files = [f"--data={path}" for path in own.data]
    both = said("both", *files, f"--evaluation={own.evaluation}")
    assert (
        f"{line}: eyes 2, Eyes 1; in a new folder, --also-label" in both
        and both.count("of a class that") == 1
    )
    written = [path for path in (tmp_path / "both").rglob("*") if path.is_file()]
    assert written and all(b"eyes" not in path.read_bytes().lower() for path in written)
    labels = [f"--label={label}" for label in (*LABELS, "eyes", "Eyes")]
    assert "of a class" not in said("named", *files, *labels)
    assert "eyes" not in said("hub", *labels[:3], "--role=coordinator")
    site = said("site", files[0], "--role=site")
    assert (
        "north.csv: 35 records of 5 classes: lungs 11, heart 10, skin 10, eyes 2, Eyes 1;" in site
    )
    assert line in said("told", files[0], "--role=site", *labels[:3])


def test_a_column_of_texts_in_the_place_of_classes_is_not_shown(tmp_path: Path) -> None:
    given = records(tmp_path, prompt="desk", target="note", role="site", name="a")
    given = replace(given, data=given.data[:1], evaluation=None)
    note = presets.classes_note("classify", given)
    assert "30 records of 30 classes: is 'note' the column of the classes?" in note
    assert "quoted" not in note
