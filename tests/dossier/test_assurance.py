"""The assurance pack: every statement has an answer, no answer says more than the run shows, and
the formats are those that others read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fedtune.audit.attack import Attack, Secrets, save
from fedtune.audit.membership import Membership
from fedtune.audit.secret import Exposure
from fedtune.core.errors import ConfigError, NotGenuine, Refused
from fedtune.evidence.dossier import content, seal
from fedtune.evidence.dossier.assurance import crate, pack, registry, sections
from fedtune.evidence.dossier.facts import documents, facts_in, find_contradiction
from fedtune.evidence.dossier.markdown import TO_FILL, markdown
from fedtune.evidence.dossier.release import release
from fedtune.evidence.sign import FILES as RUN_FILES
from fedtune.evidence.verify import verify
from tests.cli_kit import SITE, STUDY, write_study
from tests.cli_kit import run as command
from tests.dossier.conftest import again
from tests.simulated import simulate

ROOT = Path(__file__).parents[2]
# SATRE 2.0.1, pillar 5, by importance.
MANDATORY = {
    *(f"5.1.0{n}" for n in range(1, 8)),
    *("5.1.10", "5.2.01", "5.3.01", "5.3.02", "5.4.01", "5.4.02", "5.5.01", "5.6.01"),
}
RECOMMENDED = {"5.1.08", "5.1.09", "5.4.03", "5.4.04", "5.6.02", "5.7.01"}
SATRE = os.environ.get("FEDTUNE_SATRE")  # specification.yaml of its tag v2.0.1
SCHEMA = os.environ.get("FEDTUNE_REGISTRY_SCHEMA")  # deployments-schema.yaml of the registry
CRATES = os.environ.get("FEDTUNE_ROCRATE", sys.executable)  # a Python with roc-validator


def own_section(name: str) -> dict[str, Any]:
    return next(s for s in sections.package_sections() if s["id"] == name)


def build(found: dict[str, Any], **typed: str) -> dict[str, Any]:
    names = {"run/plan.json", "run/evidence.json", "release.json", "sbom.cdx.json", "audit.md"}
    return pack.build_pack(found, typed, sections.package_sections(), names)


def rows(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(s["id"], row["id"]): row for s in content["sections"] for row in s["rows"]}


# ---------------------------------------------------------------------------- the package's rows


def test_every_statement_of_satres_fifth_pillar_has_an_answer(released: Any) -> None:
    found = {r["id"]: r for r in own_section("satre")["row"] if r["id"].startswith("5.")}
    assert {*found} == MANDATORY | RECOMMENDED
    for name, row in found.items():
        wanted = "mandatory" if name in MANDATORY else "recommended"
        assert row["importance"].rstrip("*") == wanted, name
    content = json.loads((released[0] / pack.JSON).read_text())
    for name in MANDATORY:
        row = rows(content)["satre", name]
        evident = row["answer"] == pack.SHOWN and (row["facts"] or row["files"])
        assert evident or "blank" in row, name


@pytest.mark.skipif(SATRE is None, reason="FEDTUNE_SATRE names no specification.yaml of SATRE")
def test_the_rows_numbers_and_importance_are_satres() -> None:
    listed = yaml.safe_load(Path(str(SATRE)).read_text())["specification"]
    theirs = {one["requirement_index"]: one["importance"].lower() for one in listed}
    for row in own_section("satre")["row"]:
        assert theirs[row["id"]] == row["importance"], row["id"]
    ours = {row["id"] for row in own_section("satre")["row"]}
    assert {name for name in theirs if name.startswith(("5.", "3.3.")) or name == "3.1.16"} == ours


def test_what_a_row_names_is_there() -> None:
    """Tests in this repository, files of a dossier, fields of a run or of an attack."""
    files = {*seal.FILES, seal.RELEASE, "run/adapter/", "run/signature.json"}
    files |= {f"run/{name}" for name in RUN_FILES}
    for section in sections.package_sections():
        for row in section["row"]:
            where = (section["id"], row["id"])
            assert [t for t in row.get("tests", []) if not (ROOT / t).is_file()] == [], where
            named = {name.partition("#")[0] for name in row.get("files", [])}
            assert named <= files, where
            if "mechanism" in row:
                assert row.get("tests"), where
            if "unopened" in row:
                assert {*row} == {"id", "asks", "unopened"}, where


def test_every_fact_of_a_row_is_in_some_run(released: Any, tmp_path: Path) -> None:
    """A source that no run has would be "not recorded" for ever. Those of other kinds of runs are
    named here."""
    found = documents(released[0] / "run") | attacked(released[0] / "run", tmp_path)
    content = build(found | {"audit.md": True})
    missing = {
        fact["label"]
        for row in rows(content).values()
        for fact in row.get("facts", [])
        if fact["fact"] is None
    }
    assert missing == set()


def test_a_run_that_is_not_private_is_claimed_nothing_of(signed: Any) -> None:
    found = documents(signed[0])
    open_ = found["report.json"] | {"private": False, "privacy": {"mode": "off"}}
    shown = rows(build(found | {"report.json": open_}))
    private = {
        (section["id"], row["id"])
        for section in sections.package_sections()
        for row in section["row"]
        if "private" in row.get("needs", [])
    }
    assert len(private) > 20
    for name in private:
        assert "mechanism" not in shown[name] and "not differentially private" in shown[name]["why"]
    assert any("NOT PRIVATE" in note for note in build(found | {"report.json": open_})["notes"])
    twin = rows(build(found))
    assert sum("mechanism" in twin[name] for name in private) > 15


def test_a_simulation_shows_no_network(signed: Any) -> None:
    found = documents(signed[0])
    assert "a simulation" in rows(build(found | {"simulated": True}))["satre", "5.4.01"]["why"]
    twin = rows(build(found))["satre", "5.4.01"]
    assert twin["answer"] == pack.SHOWN and "TLS" in twin["mechanism"]


def test_a_row_of_a_source_that_nobody_opened_is_not_counted(signed: Any) -> None:
    content = build(documents(signed[0]))
    for section in content["sections"]:
        opened = [row for row in section["rows"] if row["answer"] != pack.NOT_OPENED]
        assert sum(section["counts"].values()) == len(opened)
        assert section["counts"] == {
            answer: Counter(row["answer"] for row in opened)[answer] for answer in pack.ANSWERS
        }
    assert "Source not opened: NIST SP 800-226 (final)" in pack.pack_page(content)


# ------------------------------------------------------------------------------- what is verified


def test_each_fact_of_the_pack_is_looked_up(released: Any) -> None:
    folder, _ = released
    found = documents(folder / "run")
    content = json.loads((folder / pack.JSON).read_text())
    facts = [*facts_in(content)]
    assert len(facts) > 60 and find_contradiction(content, found) == ""
    for fact in facts:
        before = fact["shown"]
        fact["shown"] = before + "0"  # type: ignore[index]
        assert find_contradiction(content, found), fact["source"]
        fact["shown"] = before  # type: ignore[index]


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new, 1))

    return change


def _unsaid(copy: Path) -> None:
    """The content without the blanks of the organisation, and the page that follows from it."""
    content = json.loads((copy / pack.JSON).read_text())
    for section in content["sections"]:
        section["rows"] = [row for row in section["rows"] if row["answer"] != pack.THEIRS]
    (copy / pack.JSON).write_text(pack.dump(content))
    (copy / pack.PAGE).write_text(pack.pack_page(content))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (r"assurance\.json: says 0\.5", replaced(pack.JSON, '"7.988"', '"0.5"')),
        (r"assurance\.json: is not what", replaced(pack.JSON, '"mandatory"', '"optional"')),
        (r"assurance\.json: is not what", _unsaid),
        (r"assurance\.html: is not what", replaced(pack.PAGE, "7.988", "0.5")),
        (r"registry\.yaml: is not what", replaced(registry.FILE, "epsilon: 7.988", "epsilon: 0.5")),
        (
            r"registry\.yaml: is not what",
            replaced(registry.FILE, "status: Draft", "status: Approved"),
        ),
        (r"ro-crate-metadata\.json: is not what", replaced(crate.FILE, "2 rounds", "9 rounds")),
        (r"ro-crate-metadata\.json: is not what", replaced(crate.FILE, '"north"', '"east"')),
    ],
    ids=["fact", "importance", "blanks", "page", "epsilon", "status", "plan", "site"],
)
def test_a_pack_that_says_what_the_run_does_not_is_refused_whoever_signs_it(
    released: Any, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    """Twin: the same folder, signed again as it was, verifies."""
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    verify(again(copy))
    change(copy)
    with pytest.raises(NotGenuine, match=name):
        verify(again(copy))


@pytest.mark.parametrize("name", [pack.JSON, pack.PAGE, registry.FILE, crate.FILE])
def test_no_file_of_the_pack_may_be_missing(released: Any, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    (copy / name).unlink()
    with pytest.raises(NotGenuine):
        verify(again(copy))


# --------------------------------------------------------------------------- a hospital's sections

HOUSE = """\
id = "house"
title = "Our rules for models"
from = "Policy on models, version 3"
[[row]]
id = "R1"
asks = "ε of at most 8"
mechanism = "the run's ε"
facts = [["ε, rounded up", "report.json#/privacy/epsilon", "epsilon"]]
[[row]]
id = "R2"
asks = "an owner <b>of</b> the model"
organisation = "Name and telephone."
"""


def write_house(folder: Path, text: str = HOUSE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "house.toml").write_text(text, encoding="utf-8")
    return folder


def test_a_hospital_adds_sections_of_its_own(signed: Any, tmp_path: Path) -> None:
    """The file goes into the dossier, so that anybody can build the pack again."""
    house, details, out = write_house(tmp_path / "own"), tmp_path / "d.toml", tmp_path / "out"
    options = ("--sections", house, "--details", details)
    assert command("release", signed[0], "--out", out, *options).exit_code == 0
    text = details.read_text(encoding="utf-8").replace('"house/R2" = ""', '"house/R2" = "Ada Lund"')
    details.write_text(
        text.replace('registry/data_curators" = ""', 'registry/data_curators" = "N"')
    )
    done = command("release", signed[0], "--out", out, *options)
    assert done.exit_code == 0, done.output
    content = json.loads((out / pack.JSON).read_text())
    assert [s["id"] for s in content["sections"]][-1] == "house"
    assert rows(content)["house", "R1"]["facts"][0]["fact"]["shown"] == "7.988"
    assert rows(content)["house", "R2"]["typed"] == "Ada Lund"
    page = (out / pack.PAGE).read_text()
    assert "Our rules for models" in page and "<b>of" not in page and "Ada Lund" in page
    assert yaml.safe_load((out / registry.FILE).read_text())["deployment"]["basic"][
        "data_curators"
    ] == ["N"]
    assert "assurance/house.toml" in verify(out).dossier["its word"]
    copy = shutil.copytree(out, tmp_path / "copy")
    write_house(copy / sections.FOLDER, HOUSE.replace("at most 8", "at most 1"))
    with pytest.raises(NotGenuine, match=r"assurance\.json: is not what"):
        verify(again(copy))


def test_the_pages_example_of_a_section_is_one(signed: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    own = sections.all_sections(write_house(tmp_path / "own", example))
    content = pack.build_pack(documents(signed[0]), {}, own, set())
    found = rows(content)["our-rules", "R1"]
    assert found["answer"] == pack.SHOWN and found["facts"][0]["fact"]["shown"] == "7.988"
    assert rows(content)["our-rules", "R2"]["blank"] == "our-rules/R2"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "house"\n', "", "has no id"),
        ('id = "house"', 'id = "Our House"', "small letters"),
        ('id = "house"', 'id = "satre"', "two sections are called 'satre'"),
        ("[[row]]", "[row]", "house.toml: cannot be read|house.toml"),
        ('asks = "ε of', 'ask = "ε of', "row 1: unknown key 'ask'"),
        ('id = "R2"', 'id = "R1"', "row 2: there are two rows 'R1'"),
        ('organisation = "Name', 'importance = "Name', "row 2: has no answer"),
        ("facts = [[", "facts = [] #", "row 1: a mechanism without evidence"),
        ('"epsilon"]]', '"ε"]]', "row 1: unknown format 'ε'"),
        ('"epsilon"]]', '"epsilon"], "x"]', "row 1: a fact is no list"),
        ('"report.json#', '"notes.json#', "row 1: no source 'notes.json'"),
        ('mechanism = "the', 'needs = ["luck"]\nmechanism = "the', "row 1: unknown entry 'luck'"),
        (
            'organisation = "Name',
            'blank = "x"\norganisation = "Name',
            "row 2: the key `blank` is 'x'",
        ),
        ('"R2"', "7", "row 2: id is not a text"),
    ],
)
def test_a_bad_section_is_named(
    signed: Any, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in HOUSE
    house = write_house(tmp_path / "own", HOUSE.replace(old, new, 1))
    with pytest.raises(Exception, match=message) as raised:
        release(signed[0], tmp_path / "out", sections=house)
    assert raised.type.__module__ == "fedtune.core.errors" and not (tmp_path / "out").exists()


def test_a_format_that_does_not_fit_its_figure_is_named(signed: Any, tmp_path: Path) -> None:
    house = write_house(tmp_path / "own", HOUSE.replace('"epsilon"]]', '"interval"]]'))
    with pytest.raises(ConfigError, match="section house, row R1"):
        release(signed[0], tmp_path / "out", sections=house)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no section"):
        release(signed[0], tmp_path / "out", sections=tmp_path / "empty")


# ------------------------------------------------------------------------------------- attacks


def attacked(run: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """What an attack on the run's plan found, in the files that the attack writes."""
    found = (0.62, 0.5, 0.7)
    noised = Membership(20, 20, found, found, 0.9, 0.9, 0.1, 0.1, 0.2, [(0.0, 0.0), (1.0, 1.0)])
    bare = replace(noised, auc=(0.95, 0.9, 1.0))
    secret = Exposure(8, 128, 2.0, 3.0, 1.5, 1.4, 3.5, 0)
    exposed = Secrets(secret, replace(secret, mean=6.0), 5.0, 1e-4)
    plan = json.loads((run / "report.json").read_text())["plan_digest"]
    attack = Attack("tiny", plan, 20, 8, 100, 2, 7.9, 1e-4, noised, bare, exposed)
    save(replace(attack, **changes), folder)
    step = {"audited": 1.0, "claimed": 2.0}
    audit = {"study": attack.study, "plan_digest": plan, "passed": True, "one_step": step}
    (folder / "audit.json").write_text(json.dumps(audit))
    return {name: json.loads((folder / name).read_text()) for name in sections.ATTACKS}


def test_the_argument_for_anonymity_names_the_attacks_of_this_run(
    signed: Any, tmp_path: Path
) -> None:
    """Twin: a dossier without them says that nobody tried."""
    attacked(signed[0], tmp_path / "att")
    out = tmp_path / "out"
    done = command("release", signed[0], "--out", out, "--attacks", tmp_path / "att")
    assert done.exit_code == 0, done.output
    row = rows(json.loads((out / pack.JSON).read_text()))["edpb", "55 (i), membership"]
    told = {fact["label"]: fact["fact"]["shown"] for fact in row["facts"]}
    assert told["it works without noise"] == "yes"
    assert told["area under the curve found (0.5 is a coin)"] == "0.62"
    assert {"attack.json", "audit.json"} <= {*verify(out).dossier["its word"]}
    other = json.loads((out / "attack.json").read_text())
    other["private"]["auc"][0] = 0.5
    (out / "attack.json").write_text(json.dumps(other))
    with pytest.raises(NotGenuine, match=r"assurance\.json: says 0\.62"):
        verify(again(out))
    row = rows(build(documents(signed[0])))["edpb", "55 (i), membership"]
    assert row["answer"] == pack.NOT_SHOWN and "fedtune attack" in row["why"]


def test_an_attack_of_another_study_or_on_a_sites_records_is_not_carried(
    signed: Any, tmp_path: Path
) -> None:
    """A plan of the same name with a larger σ would show a better result than this run's."""
    attacked(signed[0], tmp_path / "att", study="other")
    with pytest.raises(ConfigError, match="is of another study"):
        release(signed[0], tmp_path / "out", attacks=[tmp_path / "att"])
    attacked(signed[0], tmp_path / "att", plan_digest="sha256:" + "0" * 64)
    with pytest.raises(ConfigError, match="is of another plan"):
        release(signed[0], tmp_path / "out", attacks=[tmp_path / "att"])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "attack.json").write_text('{"study": "tiny", "membership": {}}')
    with pytest.raises(Refused, match="is not of generated records"):
        release(signed[0], tmp_path / "out", attacks=[tmp_path / "site"])
    with pytest.raises(ConfigError, match=r"has no attack\.json"):
        release(signed[0], tmp_path / "out", attacks=[tmp_path])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- others' formats


def test_the_registrys_entry_is_a_draft_of_the_runs_figures(released: Any) -> None:
    entry = yaml.safe_load((released[0] / registry.FILE).read_text())
    report = documents(released[0] / "run")["report.json"]
    stated = entry["deployment"]["privacy_loss"]["privacy_parameters"]
    assert 0 <= stated["epsilon"] - report["privacy"]["epsilon"] < 1e-3
    assert stated["delta"] == report["privacy"]["delta"] and entry["status"] == "Draft"
    basic = entry["deployment"]["basic"]
    assert basic["data_curators"][0].startswith(TO_FILL) and len(basic["publication_date"]) == 10
    assert entry["deployment"]["administrative"]["registry_authors"][0].startswith(TO_FILL)


def test_the_registrys_entry_has_both_figures_of_shared_noise(signed: Any) -> None:
    """Twin: of own noise there is one."""
    found = documents(signed[0])
    assert "holds if" not in registry.registry(found, {}, "2026-01-01T00:00:00Z")
    table = {"sites": 3, "colluding": 1, "fallback_epsilon": 9.5, "own_noise_multiplier": 0.9}
    for site in found["report.json"]["privacy"]["sites"].values():
        site["secure_aggregation"] = table
    entry = yaml.safe_load(registry.registry(found, {}, "2026-01-01T00:00:00Z"))
    said = entry["deployment"]["privacy_loss"]["privacy_parameters_details"]
    assert "at most 1 of the" in said and "ε = 9.5" in said
    assert rows(build(found))["nist", "4.2.3"]["answer"] == pack.SHOWN


def test_every_page_says_that_a_teachers_cost_is_left_out(signed: Any) -> None:
    """Twin: the same run, whose teacher's cost is in its ε."""
    found, made = documents(signed[0]), "2026-01-01T00:00:00Z"
    teacher = {"name": "before", "cost": "was trained without privacy"}
    for known in (False, True):
        taught = found["report.json"] | {"teacher": teacher | {"known": known}}
        told = found | {"report.json": taught}
        page = markdown(content.build(told, {}))
        assert ("what the run's teacher learnt" in page) is not known
        assert ("its teacher's cost is not in ε | was trained without" in page) is not known
        assert ("what the run's teacher learnt" in str(build(told)["notes"])) is not known
        entry = yaml.safe_load(registry.registry(told, {}, made))
        said = entry["deployment"]["privacy_loss"]["privacy_parameters_details"]
        assert ("Its teacher before was trained without privacy" in said) is not known


@pytest.mark.skipif(SCHEMA is None, reason="FEDTUNE_REGISTRY_SCHEMA names no copy of the schema")
def test_the_registrys_entry_fits_its_schema(released: Any) -> None:
    import jsonschema  # which takes two seconds, in every process that collects the tests

    schema = yaml.safe_load(Path(str(SCHEMA)).read_text())
    validator = jsonschema.Draft7Validator(
        schema, format_checker=jsonschema.Draft7Validator.FORMAT_CHECKER
    )
    entry = yaml.safe_load((released[0] / registry.FILE).read_text())
    assert [*validator.iter_errors(entry)] == []
    entry["deployment"]["basic"]["data_product_type"] = "Model"
    assert [*validator.iter_errors(entry)]


def test_a_run_without_privacy_has_no_entry_for_the_registry(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Twin: `released` has one."""
    study, sites = write_study(tmp_path, tiny_base), [tmp_path / n for n in ("north", "south")]
    study.write_text(STUDY.format(base=tiny_base, privacy="", privacy_off='privacy = "off"'))
    for site in sites:
        (site / "site.toml").write_text(SITE.format(name=site.name, most=8, off="true"))
    simulate(study, [site / "site.toml" for site in sites], tmp_path / "run")
    out = tmp_path / "out"
    assert not release(tmp_path / "run", out).private and not (out / registry.FILE).exists()
    page = (out / pack.PAGE).read_text()
    assert "NOT PRIVATE" in page and "this run is not differentially private" in page
    shown = rows(json.loads((out / pack.JSON).read_text()))
    assert shown["registry", "publication_date"]["answer"] == pack.NOT_SHOWN
    assert shown["satre", "3.3.07"]["answer"] == pack.NOT_SHOWN


def test_the_crate_lists_every_signed_file(released: Any) -> None:
    folder, _ = released
    graph = {one["@id"]: one for one in json.loads((folder / crate.FILE).read_text())["@graph"]}
    parts = {part["@id"] for part in graph["./"]["hasPart"]}
    assert parts - {"run/adapter/"} == {*seal.read_release(folder)[0]["files"]} - {crate.FILE}
    run = graph["#run"]
    assert graph[run["instrument"]["@id"]]["@type"] == "SoftwareApplication"
    assert [graph[site["@id"]]["name"] for site in run["participant"]] == ["north", "south"]
    assert graph["#licence"]["description"].startswith(TO_FILL)


def has_crate_validator() -> bool:
    code = "import rocrate, rocrate_validator"
    return subprocess.run([CRATES, "-c", code], capture_output=True, check=False).returncode == 0


def crate_errors(folder: Path) -> list[str]:
    """What RO-Crate's own validator says of a folder, without a network."""
    script = Path(__file__).with_name("crate_validator.py")
    done = subprocess.run(
        [CRATES, script, folder], capture_output=True, text=True, timeout=120, check=True
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(
    not has_crate_validator(), reason="no roc-validator and rocrate (FEDTUNE_ROCRATE)"
)
def test_the_crate_fits_its_profile(released: Any, tmp_path: Path) -> None:
    """Twin: an execution without its software."""
    assert crate_errors(released[0]) == []
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    content = json.loads((copy / crate.FILE).read_text())
    run = next(one for one in content["@graph"] if one["@id"] == "#run")
    del run["instrument"]
    (copy / crate.FILE).write_text(json.dumps(content))
    assert any("instrument" in error for error in crate_errors(copy))
