"""A site's data sheet: what it holds, what it gates, and that only what was typed may leave."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Site, Study, load_site, load_study
from fedtune.core.config.sheet import FIELDS, Sheet, load_sheet, template
from fedtune.core.errors import ConfigError, DataError, PolicyRefused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.policy import compute_plan, sheet_refusals
from fedtune.core.vault.worker import SiteWorker
from fedtune.launch.site import join
from fedtune.officer import sheet as sheets
from fedtune.officer.sheet import (
    ATTESTED,
    CROISSANT,
    check_attested,
    describe_data,
    private_sheet,
    public_sheet,
)
from tests.cli_kit import run as command
from tests.cli_kit import write_study
from tests.client.site_kit import begun, make_site, notes, trains

TYPED = {
    "title": "Dermatology notes of North",
    "description": "Notes of one ward, without images.",
    "publisher": "North hospital, data@example.org",
    "provenance": "the ward's record system",
    "licence": "https://example.org/agreement",
    "legal_basis": "GDPR Art. 6(1)(e) and 9(2)(j)",
    "collected_from": "2019-01-01",
    "collected_to": "2023-12-31",
    "language": "en",
    "de_identification": "none",
    "attested_by": "Bo Ek, head of data",
    "attested_on": "2026-05-03",
    "known_biases": "few children",
}


def typed(site_file: Path, **fields: str) -> None:
    lines = [f"{key} = {json.dumps(said)}" for key, said in fields.items()]
    (site_file.parent / "sheet.toml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def north(tmp_path: Path, tiny_base: Path) -> Path:
    """A study and two sites; the site file of one, whose policy asks for two fields."""
    write_study(tmp_path, tiny_base)
    path = tmp_path / "north" / "site.toml"
    path.write_text(path.read_text() + 'data_sheet = ["licence", "legal_basis"]\n')
    return path


def pinned(site_file: Path) -> Study:
    study = load_study(site_file.parents[1] / "study.toml")
    digest = "sha256:" + "0" * 64
    return study.changed(lora={"a_digest": digest})


def test_an_empty_sheet_is_written_to_be_filled(north: Path) -> None:
    first = command("data", "describe", north)
    assert first.exit_code == 0 and "fill it" in first.output
    path = north.parent / "sheet.toml"
    assert path.read_text() == template() and path.stat().st_mode & 0o077 == 0
    assert load_sheet(load_site(north)) == Sheet()
    second = command("data", "describe", north, "--json")
    made = json.loads(second.stdout)
    assert made["held"] == [] and made["rows"] == 12 and made["private"].endswith(CROISSANT)


def test_the_sheet_lies_beside_the_records_with_counts_and_hashes(north: Path) -> None:
    typed(north, **TYPED)
    made = describe_data(load_site(north))
    assert made.private == north.parent / f"data.jsonl{CROISSANT}"
    assert made.private.stat().st_mode & 0o077 == 0
    body = json.loads(made.private.read_text())
    counts = {fact["name"]: fact["value"] for fact in body["variableMeasured"]}
    assert counts == {"usable records": 12, "records": 12, "rows that are not used": 0}
    (file,) = body["distribution"]
    assert file["sha256"] == sheets._sha256(north.parent / "data.jsonl")
    assert body["usageInfo"] == TYPED["legal_basis"]
    assert body["rai:dataBiases"] == "few children"
    assert body["rai:dataCollectionTimeFrame"] == ["2019-01-01", "2023-12-31"]


def test_what_rows_name_is_attested_in_a_folder_of_records_alone(north: Path) -> None:
    site = load_site(north)
    (image := north.parent / "scan.png").write_bytes(b"a scan")
    folder = site.model_copy(
        update={"data": site.data.model_copy(update={"path": site.data.path.parent})}
    )
    before = sheets.records_hash(site), sheets.records_hash(folder)
    image.write_bytes(b"another scan")
    assert sheets.records_hash(site) == before[0] and sheets.records_hash(folder) != before[1]


def one_more(site: Site) -> None:
    """Add a record to a site's file, and change another."""
    lines = site.data.path.read_text().splitlines()
    lines[0] = lines[0].replace("Record", "Another record")
    site.data.path.write_text("\n".join([*lines, lines[-1]]))


def test_the_public_sheet_is_what_was_typed_whatever_the_records_are(
    north: Path, tmp_path: Path
) -> None:
    """Twin: the private one, which counts, differs."""
    typed(north, **TYPED)
    out = tmp_path / "public.json"
    refused = command("data", "describe", north, "--public", out)
    assert refused.exit_code == 3 and "policy.release" in refused.stderr and not out.exists()
    north.write_text(north.read_text() + 'release = ["sheet"]\n')
    site = load_site(north)
    before = describe_data(site, out)
    assert before.public and before.private
    public, private = out.read_bytes(), before.private.read_bytes()
    assert leaks(json.loads(public)) == []
    one_more(site)
    after = describe_data(site, out)
    assert out.read_bytes() == public
    assert after.private and after.private.read_bytes() != private


def leaks(body: dict[str, Any]) -> list[str]:
    """What a public sheet holds that nobody typed."""
    own = {*sheets.CONTEXT, *sheets.CONFORMS, "sc:Dataset", "sc:Organization", "sc:Person"}
    found, pending = [], [value for key, value in body.items() if key != "@context"]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif value not in own and value not in TYPED.values():
            found.append(str(value))
    return found


def test_twin_a_sheet_with_a_count_is_caught(north: Path) -> None:
    site, sheet = load_site(north), Sheet(**TYPED)
    assert leaks(public_sheet(sheet, "north")) == []
    assert "12" in leaks(private_sheet(sheet, site, {"records": 12}))


def test_a_site_without_the_fields_does_not_join(north: Path) -> None:
    study, site = pinned(north), load_site(north)
    says = [refusal.happened for refusal in sheet_refusals(study, site)]
    assert says == [f"policy.data_sheet: the data sheet lacks {name}" for name in
                    ("licence", "legal_basis")]  # fmt: skip
    typed(north, licence="x", legal_basis=" ")
    with pytest.raises(PolicyRefused, match=r"policy\.data_sheet: the data sheet lacks legal_ba"):
        compute_plan(study, site)
    typed(north, licence="x", legal_basis="y")
    assert [*sheet_refusals(study, site)] == []
    asks = study.changed(study={"data_sheet": ["purpose"]})
    assert asks.digest != study.digest and "data_sheet" not in study.model_dump_json()
    with pytest.raises(PolicyRefused, match=r"study\.data_sheet: the data sheet lacks purpose"):
        compute_plan(asks, site)


def test_a_refusal_of_the_sheet_is_the_sites_answer_in_a_simulation(north: Path) -> None:
    folder = north.parents[1]
    done = command("simulate", folder / "study.toml", "--out", folder / "run", "--json")
    assert done.exit_code == 0, done.stderr  # the other site trains alone
    said = json.loads(done.stdout)["sites"]
    assert "policy.data_sheet: the data sheet lacks licence" in said["north"]
    assert said["south"] == "admitted"


def test_records_that_changed_since_keep_a_site_from_joining(north: Path) -> None:
    """On this machine alone, before anything is sent: the answer would depend on the records."""
    site = load_site(north)
    with pytest.raises(PolicyRefused, match="nobody has attested"):
        check_attested(site)
    typed(north, **TYPED)
    describe_data(site)
    check_attested(site)
    assert (site.site.state / ATTESTED).stat().st_mode & 0o077 == 0
    typed(north, **TYPED | {"licence": "another"})
    with pytest.raises(PolicyRefused, match="sheet: changed since"):
        check_attested(site)
    typed(north, **TYPED)
    one_more(site)
    with pytest.raises(PolicyRefused, match="records: changed since"):
        check_attested(site)
    with pytest.raises(PolicyRefused, match="records: changed since"):
        join(north)  # before it looks for a coordinator, of which it has none
    study = pinned(north)
    assert [*sheet_refusals(study, site)] == []  # what is sent does not know of it
    assert compute_plan(study, site) is not None
    describe_data(site)
    check_attested(site)


def test_no_answer_tells_that_records_changed(tmp_path: Path, tiny_base: Path) -> None:
    """The whole worker answers a plan as if the sheet were attested, and trains."""
    folder = tmp_path / "site"
    notes(folder)
    site = make_site(folder, {"data_sheet": ["licence"]}, patient="who")
    site.site.state.mkdir()
    (site.site.state / "sheet.toml").write_text('licence = "x"\n')
    describe_data(site)
    made = begun(tiny_base)
    before = SiteWorker(site).prepare(made.study, made.frozen)
    lines = site.data.path.read_text().splitlines()
    site.data.path.write_text("\n".join(lines[1:]))
    with pytest.raises(PolicyRefused, match="records: changed since"):
        check_attested(site)
    worker = SiteWorker(site)
    assert worker.prepare(made.study, made.frozen) == before and before.admitted
    trains(worker, made, 1)
    describe_data(site)  # now that there is a ledger, who attested is in its audit log
    log = audit_log.verify(site.site.state, Ledger(site.site.state).key.public)
    assert "attest" in [entry["event"] for entry in log.entries]


def test_who_asks_for_no_sheet_is_asked_for_none(north: Path) -> None:
    south = load_site(north.parents[1] / "south" / "site.toml")
    check_attested(south)
    assert [*sheet_refusals(load_study(north.parents[1] / "study.toml"), south)] == []


def test_a_folder_of_files_is_hashed_whole(tmp_path: Path, north: Path) -> None:
    folder = north.parent / "notes"
    folder.mkdir()
    shutil.copy(north.parent / "data.jsonl", folder / "a.jsonl")
    north.write_text(north.read_text().replace('path = "data.jsonl"', 'path = "notes"'))
    typed(north, **TYPED)
    site = load_site(north)
    made = describe_data(site)
    assert made.private == north.parent / f"notes{CROISSANT}"
    check_attested(site)
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")
    with pytest.raises(PolicyRefused, match="records: changed"):
        check_attested(site)


def test_what_a_sheet_may_not_hold(north: Path) -> None:
    for text, says in (("no_such = 'x'", "no_such"), ("licence = 5", "licence")):
        (north.parent / "sheet.toml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_sheet(load_site(north))
    typed(north, **TYPED)
    (north.parent / "data.jsonl").unlink()
    with pytest.raises(DataError):
        describe_data(load_site(north))
    assert {*TYPED} <= {*FIELDS} == {*Sheet.model_fields}


@pytest.mark.skipif(
    importlib.util.find_spec("mlcroissant") is None, reason="mlcroissant is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_mlcroissant_reads_both_sheets(north: Path, tmp_path: Path) -> None:
    import mlcroissant

    typed(north, **TYPED)
    north.write_text(north.read_text() + 'release = ["sheet"]\n')
    made = describe_data(load_site(north), tmp_path / "public.json")
    for path in (made.private, made.public):
        assert path
        metadata = mlcroissant.Dataset(jsonld=path).metadata
        assert not metadata.issues.errors, metadata.issues.report()
        assert metadata.name == TYPED["title"]
        assert metadata.data_biases == ["few children"] or metadata.data_biases == "few children"
