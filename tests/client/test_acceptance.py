"""`fedtune accept`: who is judged on, what is kept, and that none of it leaves."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

import fedtune
from fedtune.core.config import load_site
from fedtune.core.data.records import unit_member
from fedtune.core.errors import ConfigError, DataError, InputError
from fedtune.core.ledger.audit_log import AuditLog, verify
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.lora import digest
from fedtune.homes.known_homes import check_home
from fedtune.officer.acceptance.accept import Acceptance, accept, read_record, tell
from fedtune.officer.acceptance.records import TRAINED, WITHDREW
from fedtune.officer.purge import listing, purge
from fedtune.presets.templates import SITE as SITE_TEMPLATE
from fedtune.presets.templates import acceptance
from fedtune.report.start_file import ORIGIN
from tests.cli_kit import run as command
from tests.client.adoption_kit import CHARGE
from tests.guarantee.search import Finder, forms
from tests.heads_kit import CAUSAL_LORA, CLASSIFY, LABELS, made_run

SITE = """
[site]
name = "north"
declared_size = 40
state = "state"
[data]
path = "data.jsonl"
columns = { text = "note", label = "class", patient = "who" }
[acceptance]
path = "held.jsonl"
columns = { text = "note", label = "class", patient = "who" }
groups = ["sex", "age"]
bands = { age = [40] }
thresholds = { accuracy = 0.1, ece = 0.9 }
recall = { "no finding" = 0.5 }
"""
# In every held-out record, and a patient's key: nothing that is kept may have either.
WORD, KEY = "Zaphod-Beeblebrox-1979", "Trillian-McMillan-1981"


def row(who: str, number: int, **more: Any) -> dict[str, Any]:
    note = f"{WORD} seen on the ward, number {number}"
    return {"who": who, "note": note, "class": LABELS[number % 3], **more}


def write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def world(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("data.jsonl", [row(f"t{n}", 1000 + n) for n in range(20)])
    held = [
        row(f"h{n // 2}", n, sex="f" if n % 4 < 2 else "m", age=20 + n // 2 if n % 7 else None)
        for n in range(96)
    ]
    held[94]["who"] = held[95]["who"] = KEY
    write("held.jsonl", held)
    Path("site.toml").write_text(SITE)
    made_run(tmp_path / "run", tiny_encoder, CLASSIFY)
    return tmp_path


def judged() -> Acceptance:
    return accept("run", load_site("site.toml"))


# ------------------------------------------------------------------------------ who is judged on


def test_whoever_was_trained_on_is_left_out_with_all_records(world: Path) -> None:
    site = load_site("site.toml")
    assert judged().figures["patients"] == 48
    held = [json.loads(line) for line in Path("held.jsonl").read_text().splitlines()]
    write("data.jsonl", [row("h3", 7000), *(row(f"t{n}", 1000 + n) for n in range(20))])
    ledger = Ledger(site.site.state)
    ledger.declare("an earlier dataset", [], members=[unit_member("h5")])
    copied = {**held[20], "who": "another key"}  # of h10
    write("data.jsonl", [copied, row("h3", 7000)])
    made = judged()
    assert made.figures["left_out"] == {TRAINED: 3}
    assert (made.figures["patients"], made.figures["records"]) == (45, 90)
    assert made.figures["compared_by"] == "patients" and made.figures["training_read"]


def test_a_decision_says_that_a_restore_may_have_lost_who_trained(world: Path) -> None:
    """The backup is from before h5 trained. Twins: no restore, and one of a whole ledger."""
    site, says = load_site("site.toml"), "may be among those judged on"
    state = site.site.state
    ledger = Ledger(state)
    ledger.backup(world / "early")
    ledger.declare("an earlier dataset", [], members=[unit_member("h5")])
    made = judged()
    assert made.figures["left_out"] == {TRAINED: 1} and made.figures["known_since"] == ""
    for lost in (False, True):
        if lost:
            (state / "ledger.db").unlink()
        Ledger.restore(state, world / "early")
        made = judged()
        assert made.figures["left_out"] == ({} if lost else {TRAINED: 1})
        record = json.loads((made.folder / "record.json").read_text())
        assert bool(record["known_since"]) == bool(made.figures["known_since"]) == lost
        assert (says in (made.folder / "page.html").read_text()) == lost


def test_whoever_withdrew_is_left_out(world: Path) -> None:
    site = load_site("site.toml")
    Ledger(site.site.state).withdraw(unit_member("h7"))
    made = judged()
    assert made.figures["left_out"] == {WITHDREW: 1} and made.figures["records"] == 94


@pytest.mark.parametrize("how", ["charged", "restored", "adopted"])
def test_a_decision_says_since_when_the_ledger_knows_who_trained(world: Path, how: str) -> None:
    """Of what a restore or an adoption entered, it knows only who is in the site's files then or
    later. Twin: a ledger that lost nothing."""
    state = load_site("site.toml").site.state
    ledger = Ledger(state)
    ledger.declare("records", [], members=[unit_member("h5")])
    ledger.backup(world / "copy")
    paid = replace(CHARGE, membership="onco" if how == "adopted" else "", adopted=how == "adopted")
    ledger.reserve("records", paid, "adapter", lambda charges: None)
    if how == "restored":
        (state / "ledger.db").unlink()
        Ledger.restore(state, world / "copy")
    made = judged()
    day = "" if how == "charged" else time.strftime("%Y-%m-%d", time.gmtime())
    record = read_record(made.folder / "record.json", Ledger(state).key.public)
    assert record["known_since"] == made.figures["known_since"] == day
    said = f"knows who trained here since {day} alone" in (made.folder / "page.html").read_text()
    assert said is bool(day)


def test_a_ledger_that_is_not_mounted_does_not_say_that_nobody_withdrew(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(world / "xdg"))
    site = load_site("site.toml")
    Ledger(site.home).withdraw(unit_member("h7"))
    check_home(site)
    site.home.rename("volume")
    site.home.mkdir()
    for use in (judged, lambda: tell("run", site, "told")):
        with pytest.raises(ConfigError, match="is not there"):
            use()
    assert not any(site.home.iterdir())


def test_without_a_patient_column_contents_are_compared(world: Path) -> None:
    held = [json.loads(line) for line in Path("held.jsonl").read_text().splitlines()]
    write("data.jsonl", [held[0], held[1], row("t1", 1000)])
    text = SITE.replace(', patient = "who" }\n[acceptance]', " }\n[acceptance]")
    Path("site.toml").write_text(text)
    made = judged()
    assert made.figures["compared_by"] == "contents"
    assert made.figures["left_out"] == {TRAINED: 1}, "both records are of one patient"
    page = (made.folder / "page.html").read_text()
    assert "a table names no patient column" in page


def test_nobody_left_is_an_error_that_says_why(world: Path) -> None:
    write("data.jsonl", [json.loads(x) for x in Path("held.jsonl").read_text().splitlines()])
    with pytest.raises(DataError, match="48 trained on here"):
        judged()
    assert not list(Path("state").rglob("record.json"))


# ------------------------------------------------------------------------------- what is kept


def test_the_record_is_signed_private_and_says_what_was_judged(world: Path) -> None:
    site = load_site("site.toml")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    made = judged()
    assert site.acceptance is not None
    public = Ledger(site.site.state).key.public
    path = made.folder / "record.json"
    record = read_record(path, public)
    assert record["decision"] == made.decision == made.figures["decision"]
    assert record["settings"] == site.acceptance.digest
    assert record["model"]["plan"] == fedtune.Run("run").study.digest
    for kept in made.folder.iterdir():
        assert kept.stat().st_mode & 0o777 == 0o600, kept
    assert made.folder.stat().st_mode & 0o777 == 0o700
    assert not Finder([*forms(WORD), *forms(KEY)]).in_folder(made.folder)
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before
    other = record | {"decision": "accepted" if made.decision != "accepted" else "refused"}
    path.write_text(json.dumps(other))
    with pytest.raises(InputError, match="not signed by this site"):
        read_record(path, public)


def test_the_audit_log_has_the_act_and_no_figure(world: Path) -> None:
    made = judged()
    public = Ledger(Path("state")).key.public
    (entry,) = verify(Path("state"), public).entries
    assert entry["event"] == "assess" and entry["rule"] == ""
    assert sorted(entry["facts"]) == ["model", "record", "settings"]
    assert made.decision not in json.dumps(entry)
    assert not any(isinstance(value, int | float) for value in entry["facts"].values())


def test_records_are_named_only_under_the_sites_salt(world: Path) -> None:
    def keyed() -> str:
        return str(json.loads((judged().folder / "record.json").read_text())["held_out"])

    first = keyed()
    assert keyed() == first
    Path("state").rename("state-before")
    assert keyed() != first


def test_earlier_looks_at_the_same_records_are_counted(world: Path) -> None:
    assert judged().figures["looks"] == {"earlier": 0, "models": 0, "settings": 0}
    Path("site.toml").write_text(SITE.replace("accuracy = 0.1", "accuracy = 0.2"))
    judged()
    made = judged()
    assert made.figures["looks"] == {"earlier": 2, "models": 1, "settings": 2}
    assert "looked at 2 times before" in (made.folder / "page.html").read_text()
    write("held.jsonl", [row(f"x{n}", 500 + n, sex="f", age=30) for n in range(30)])
    assert judged().figures["looks"]["earlier"] == 0


def test_a_purge_takes_page_and_figures_and_leaves_the_record(world: Path) -> None:
    made = judged()
    contents = listing(load_site("site.toml"))
    assert len(contents.deletable["pages and figures of acceptances"]) == 2
    assert not contents.unknown
    purge(contents)
    assert [path.name for path in made.folder.iterdir()] == ["record.json"]


# ----------------------------------------------------------------------------- what is shown


def test_groups_and_bands_are_columns_beside_the_records(world: Path) -> None:
    made = judged()
    groups = {(one["column"], one["value"]) for one in made.figures["compared"]}
    ages = {("age", value) for value in ("(missing)", "40 and above", "below 40")}
    assert groups == {("sex", "f"), ("sex", "m"), *ages}
    assert {one["measure"] for one in made.figures["compared"]} == {
        "accuracy",
        "overconfidence",
        "recall: no finding",
    }


def test_a_column_of_many_values_is_no_group(world: Path) -> None:
    Path("site.toml").write_text(SITE.replace('["sex", "age"]', '["who", "age"]'))
    with pytest.raises(ConfigError, match="'who' has 96 values"):
        write("held.jsonl", [row(f"h{n}", n, age=1) for n in range(96)])
        judged()


def test_a_threshold_that_the_records_do_not_have_is_refused(world: Path) -> None:
    Path("site.toml").write_text(SITE.replace("ece = 0.9", "preference = 0.9"))
    with pytest.raises(ConfigError, match="'preference' cannot be measured"):
        judged()


def test_what_a_column_holds_is_inert_on_the_page(world: Path) -> None:
    hostile = "<script>alert(1)</script>"
    held = [row(f"h{n}", n, sex=hostile if n % 2 else "f", age=30) for n in range(60)]
    write("held.jsonl", held)
    page = (judged().folder / "page.html").read_text()
    assert hostile not in page and "&lt;script&gt;" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )


def test_the_command_says_what_was_decided(world: Path) -> None:
    result = command("accept", "run", "--site", "site.toml", "--json")
    told = json.loads(result.stdout)
    assert told["decision"] in ("accepted", "refused", "not resolved")
    shown = command("accept", "run", "--site", "site.toml").stdout
    assert shown.startswith(told["decision"]) and "no ε covers it" in shown


# ------------------------------------------------------------------------- that none of it leaves


def test_nothing_of_it_is_in_what_a_site_shows_or_sends(world: Path) -> None:
    """The ledger is that of a site that judged nothing; of its audit log a site seals the head
    alone, to itself, in one length."""
    ledger = Ledger(Path("state"))
    before, sent = ledger.head, ledger.head_statement("")
    judged()
    ledger = Ledger(Path("state"))
    head = AuditLog(ledger.folder, ledger.key).head
    assert ledger.head == before and head
    assert len(ledger.head_statement(head)["token"]) == len(sent["token"])
    beside = {path.name for path in Path("state").iterdir()} - {"audit.jsonl", "audit.lock"}
    assert {name for name in beside if not name.startswith("ledger")} == {
        "acceptance",
        "salt",
        "site.key",
    }


def test_a_review_says_what_telling_a_decision_is(study: Path) -> None:
    site = Path("north/site.toml")
    before = command("review", study, "--site", site).output
    assert "fedtune accept" not in before
    records = 'path = "held.jsonl"\ncolumns = { prompt = "prompt", completion = "completion" }\n'
    site.write_text(f"{site.read_text()}\n[acceptance]\n{records}thresholds = {{ loss = 1.0 }}\n")
    shown = " ".join(command("review", study, "--site", site).output.split())
    assert "an exact fact about held-out patients, outside this ε" in shown
    assert "no training or release of a coordinator may follow from it" in shown


def test_a_dossier_is_judged_by_the_run_in_it(world: Path) -> None:
    Path("dossier").mkdir()
    shutil.move("run", "dossier/run")
    made = accept("dossier", load_site("site.toml"))
    assert read_record(made.folder / "record.json", Ledger(Path("state")).key.public)


def test_only_the_command_reads_the_table_and_what_was_decided() -> None:
    """Few modules name either, each for a reason; a round, a plan and an answer are none of them.

    The command and its configuration read the table. `review` and `records` name it in what they
    say. `purge` deletes the pages, `withdraw` and `adopt` look for a patient among who is only
    judged on, `personalise` trains on none of them, and the half on the network is kept from the
    folders.
    """
    root = Path(fedtune.__file__).parent
    allowed = {
        "__init__.py",
        "cli/accept.py",
        "cli/commands.py",
        "officer/adopt.py",
        "officer/purge.py",
        "officer/review.py",
        "officer/withdraw.py",
        "core/config/site.py",
        "core/config/state_files.py",
        "courier/process.py",
        "core/data/records.py",
        "officer/personalise/records.py",
    }
    named = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(
            word in path.read_text()
            for word in (".acceptance", "ACCEPTANCE", "acceptance import", 'acceptance"')
        )
    }
    named = {name for name in named if not name.startswith("officer/acceptance/")}
    assert named <= allowed


# -------------------------------------------------------------------- other models, other records

TEXT = SITE.replace('text = "note", label = "class"', 'prompt = "note", completion = "class"')
PAIRS = SITE.replace(
    'text = "note", label = "class"', 'prompt = "note", chosen = "a", rejected = "b"'
)
YES_NO = {"name": "causal_lm", "max_length": 64}


def a_run(base: Path, objective: dict[str, Any], **tables: Any) -> None:
    shutil.rmtree("run")
    made_run(Path("run"), base, objective, lora=CAUSAL_LORA, **tables)


def as_text(site: str, thresholds: str) -> None:
    before = 'thresholds = { accuracy = 0.1, ece = 0.9 }\nrecall = { "no finding" = 0.5 }'
    assert before in site
    Path("site.toml").write_text(site.replace(before, f"thresholds = {thresholds}"))


def test_a_model_that_writes_is_judged_by_loss(world: Path, tiny_base: Path) -> None:
    a_run(tiny_base, YES_NO)
    as_text(TEXT, "{ loss = 90.0, perplexity = 2.0, exact_match = 0.5 }")
    made = judged()
    by_name = {one["measure"]: one["decision"] for one in made.figures["judged"]}
    assert by_name == {"loss": "accepted", "perplexity": "refused", "exact_match": "refused"}
    assert "reliability" not in made.figures and len(made.figures["worst"]) == 20
    assert set(made.figures["models"]) == {"this model", "base alone"}


@pytest.mark.parametrize("first", ["y", "yes of course"], ids=["a token each", "longer"])
def test_declared_choices_are_classes(world: Path, tiny_base: Path, first: str) -> None:
    choices = [f" {first}", " n"]
    rows = [row(f"h{n}", n, sex="f", age=30) | {"class": choices[n % 2]} for n in range(60)]
    write("held.jsonl", rows)
    table = {
        "path": str(world / "held.jsonl"),
        "columns": {"prompt": "note", "completion": "class"},
        "metric": "accuracy",
        "choices": choices,
    }
    a_run(tiny_base, YES_NO, evaluation=table)
    as_text(TEXT, "{ accuracy = 0.99, ece = 0.9 }")
    made = judged()
    assert made.decision == "refused" and made.figures["reliability"]
    shares = [one["probability"] for one in made.figures["reliability"]]
    assert all(0.5 <= share <= 1 for share in shares), "of the likelier of two"
    recalls = {name for name in made.figures["models"]["this model"] if name.startswith("recall")}
    assert recalls == {f"recall: {first}", "recall: n"}


def test_pairs_are_judged_by_their_order(world: Path, tiny_base: Path) -> None:
    rows = [row(f"h{n}", n, sex="f", age=30) | {"a": "yes", "b": "no"} for n in range(60)]
    write("held.jsonl", rows)
    write("data.jsonl", [row("t1", 1000) | {"a": "yes", "b": "no"}] * 3)
    a_run(tiny_base, {"name": "dpo", "max_length": 64})
    as_text(PAIRS, "{ preference = 0.5 }")
    made = judged()
    assert {one["measure"] for one in made.figures["judged"]} == {"preference"}
    assert set(made.figures["models"]["this model"]) == {"preference", "loss"}


def test_a_sites_own_model_is_measured_beside(world: Path, tiny_encoder: Path) -> None:
    shutil.copytree("run", "own")
    Path("site.toml").write_text(
        SITE.replace('groups = ["sex", "age"]', 'alone = "own"', 1).replace(
            "bands = { age = [40] }\n", ""
        )
    )
    models = judged().figures["models"]
    assert list(models) == ["this model", "site alone", "base alone"]
    own = models["site alone"]["accuracy"]
    assert own["change"] == 0 and own["change_interval"] == [0, 0]
    assert own["figure"] == models["this model"]["accuracy"]["figure"]
    shutil.rmtree("own")
    made_run(Path("own"), tiny_encoder, {**CLASSIFY, "labels": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="its classes differ from those"):
        judged()


def test_the_public_start_is_measured_where_the_folder_has_it(world: Path) -> None:
    run = fedtune.Run("run")
    arrays = {name: array / 2 for name, array in run.adapter().items()}
    checkpoint = {f"{ORIGIN}{name}": array for name, array in arrays.items()}
    plan = json.loads(Path("run/plan.json").read_text())
    plan["start"] = {"steps": 1, "learning_rate": 0.1, "digest": digest(arrays)}
    plan["public"] = {"path": "p.jsonl", "columns": {"text": "note", "label": "class"}}
    plan["public"]["licence"] = "CC0-1.0"
    Path("run/plan.json").write_text(json.dumps(plan))
    figures = judged().figures
    assert "public start" not in figures["models"]
    assert "the coordinator's run and a dossier have it" in figures["not_scored"]["public start"]
    Path("run/checkpoint").mkdir(exist_ok=True)
    save_file(checkpoint, "run/checkpoint/frozen.safetensors")
    models = judged().figures["models"]
    assert list(models) == ["this model", "public start", "base alone"]
    other = {name: array + 1 for name, array in checkpoint.items()}
    save_file(other, "run/checkpoint/frozen.safetensors")
    assert "public start" not in judged().figures["models"], "not what the plan pins"


# ---------------------------------------------------------------------------------- the template


def uncommented(text: str) -> str:
    return "".join(
        line.removeprefix("# ") + "\n" for line in text.splitlines() if line.startswith("# ")
    )


@pytest.mark.parametrize("columns", ['text = "note"\nlabel = "class"', 'text = "q"'])
def test_what_a_sites_file_has_as_a_comment_is_a_table(world: Path, columns: str) -> None:
    said = uncommented(acceptance('path = "data.jsonl"\nsource = "csv"', columns))
    Path("site.toml").write_text(SITE.split("[acceptance]")[0] + said)
    table = load_site("site.toml").acceptance
    assert table is not None and table.source == "csv" and table.path == world / "accept.jsonl"
    assert set(table.thresholds) == ({"accuracy", "ece"} if table.columns.label else {"loss"})
    for where in ('url = "sqlite:///clinic.db"\noptions = { table = "note" }',
                  'path = "export"\nsource = "fhir"'):  # fmt: skip
        said = uncommented(acceptance(where, columns))
        Path("site.toml").write_text(SITE.split("[acceptance]")[0] + said)
        table = load_site("site.toml").acceptance
        assert table is not None
        assert (table.path == world / "accept") if table.source == "fhir" else table.url
        assert table.options.get("table") in (None, "accept"), "not the table that trains"
    commented = SITE_TEMPLATE[SITE_TEMPLATE.index("# [acceptance]") :].split("\n\n")[0] + "\n"
    Path("site.toml").write_text(SITE.split("[acceptance]")[0] + uncommented(commented))
    assert load_site("site.toml").acceptance is not None
