"""`fedtune accept`: who is judged on, what is kept, and that none of it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.client.acceptance.accept import Acceptance, accept, read_record
from fedtune.client.acceptance.records import TRAINED, WITHDREW
from fedtune.client.purge import listing, purge
from fedtune.config import load_site
from fedtune.data.records import unit_member
from fedtune.errors import ConfigError, DataError, InputError
from fedtune.evidence.audit_log import AuditLog, verify
from fedtune.ledger.ledger import Ledger
from tests.cli_kit import run as command
from tests.guarantee.search import Finder, forms
from tests.heads_kit import CLASSIFY, LABELS, made_run

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


def test_whoever_withdrew_is_left_out(world: Path) -> None:
    site = load_site("site.toml")
    Ledger(site.site.state).withdraw(unit_member("h7"))
    made = judged()
    assert made.figures["left_out"] == {WITHDREW: 1} and made.figures["records"] == 94


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


def test_only_the_command_reads_the_table_and_what_was_decided() -> None:
    """No module but those of an acceptance, and what deletes its pages, names either."""
    root = Path(fedtune.__file__).parent
    own = {
        "cli/accept.py",
        "cli/main.py",
        "client/purge.py",
        "config/state_files.py",
        "__init__.py",
    }
    named = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(
            word in path.read_text()
            for word in (".acceptance", "ACCEPTANCE", "acceptance import", 'acceptance"')
        )
    }
    named = {name for name in named if not name.startswith("client/acceptance/")}
    assert named <= own | {"config/site.py", "data/records.py", "client/review.py"}
