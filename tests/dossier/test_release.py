"""What `fedtune release` writes: whole, honest about what a run is, and in formats others read."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import ConfigError, InputError, NotGenuine, Refused
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import fingerprints, sign
from fedtune.evidence.dossier import content as dossier_content
from fedtune.evidence.dossier import openssf, pictures, seal
from fedtune.evidence.dossier.assurance import sections as assurance
from fedtune.evidence.dossier.curve import curve
from fedtune.evidence.dossier.diagrams import PICTURES
from fedtune.evidence.dossier.facts import documents, facts_in, find_contradiction
from fedtune.evidence.dossier.markdown import TO_FILL, markdown
from fedtune.evidence.dossier.page import page
from fedtune.evidence.dossier.release import details_template, read_details, release
from fedtune.evidence.dossier.sbom import INSTALLED, RECORDED
from fedtune.evidence.verify import verify
from tests.cli_kit import run as command
from tests.dossier.conftest import CONTACT
from tests.verify_kit import forged, lower, write_report


def test_a_run_that_does_not_verify_has_no_dossier(signed: Any, tmp_path: Path) -> None:
    bad, out = forged(signed[0], tmp_path, lower), tmp_path / "out"
    with pytest.raises(NotGenuine, match="step logs"):
        release(bad, out)
    for name in ("signature.json", "evidence.json"):
        (bad / name).unlink()
    with pytest.raises(NotGenuine, match="is not signed"):
        release(bad, out)
    assert not out.exists() and not [*tmp_path.glob("out*")]


def test_one_command_from_a_run_to_a_folder(signed: Any, tmp_path: Path) -> None:
    out = tmp_path / "dossier"
    done = command("release", signed[0], "--out", out)
    assert done.exit_code == 0, done.output
    assert "blanks are for people to fill" in done.output
    names = {path.name for path in out.iterdir()} - {"dossier.pdf", "model.sig", "model.pub"}
    assert names == {
        *("README.md", "dossier.html", "dossier.json", "dossier.md", "release.json"),
        *("run", "sbom.cdx.json", "pictures", "assurance.html", "assurance.json"),
        *("registry.yaml", "ro-crate-metadata.json"),
    }
    again = command("release", signed[0], "--out", out)
    assert again.exit_code == 2 and "exists" in again.stderr


CA = "-----BEGIN CERTIFICATE-----"


def consortium(folder: Path, run: Path) -> tuple[Path, SigningKey]:
    """A run as a consortium's coordinator keeps it, signed by everybody's keys of a new home."""
    copy = shutil.copytree(run, folder / "runs" / "study")
    owner = SigningKey.at(folder / "coordinator" / "signing.key")
    evidence = json.loads((copy / sign.EVIDENCE).read_text())
    report = json.loads((copy / "report.json").read_text())
    keys = {name: SigningKey() for name in evidence["sites"]}
    for entry in evidence["updates"]:
        text = canonical(json.loads(entry["header"]) | {"receiver": owner.public})
        entry |= {"header": text.decode()}
        entry |= {"signature": keys[entry["site"]].sign(b"fedtune update\0" + text)}
    for name, key in keys.items():
        evidence["sites"][name]["signing"] = key.public
        report["privacy"]["sites"][name]["key"] = key.public
    (copy / sign.EVIDENCE).write_bytes(canonical(evidence))
    write_report(copy, report)
    sign.sign_files(copy, owner, CA)
    return copy, owner


def test_a_consortiums_dossier_is_signed_with_its_coordinators_key(
    signed: Any, tmp_path: Path
) -> None:
    run, owner = consortium(tmp_path, signed[0])
    made = release(run, tmp_path / "dossier")
    name = fingerprints.of_consortium(CA, owner.public)
    assert made.signer == name == made.dossier["run signed by"] and not made.simulated
    assert "A simulation" not in (tmp_path / "dossier" / "dossier.md").read_text()
    assert verify(tmp_path / "dossier", trust=name).trusted
    elsewhere = shutil.copytree(run, tmp_path / "sent" / "runs" / "study")
    with pytest.raises(Refused, match="whose key is not in"):
        release(elsewhere, tmp_path / "out")
    SigningKey.at(tmp_path / "other" / "signing.key")
    with pytest.raises(Refused, match="whose key is not in"):
        release(run, tmp_path / "out", home=tmp_path / "other")
    assert not (tmp_path / "out").exists()
    again = release(elsewhere, tmp_path / "out", home=tmp_path / "coordinator")
    assert again.signer == name


def test_what_only_people_can_say_is_a_blank_until_they_say_it(
    released: Any, signed: Any, tmp_path: Path
) -> None:
    text = (released[0] / "dossier.md").read_text()
    count = sum(1 for _ in dossier_content.blanks())
    assert text.count(TO_FILL) >= count - 1  # one was filled; one key may stand in two places
    assert "Data office" in text and "typed by a person, not checked" in text
    file = tmp_path / "details.toml"
    first = command("release", signed[0], "--out", tmp_path / "out", "--details", file)
    assert first.exit_code == 0 and not (tmp_path / "out").exists()
    names = {b["blank"] for b in dossier_content.blanks()}
    names |= {assurance.key(*one) for one in assurance.blanks(assurance.package_sections())}
    assert {*tomllib.loads(file.read_text())} == names
    assert read_details(file) == dict.fromkeys(tomllib.loads(details_template()), "")
    file.write_text('contact = "x"\nno_such = "y"\n')
    with pytest.raises(ConfigError, match="no_such"):
        read_details(file)
    file.write_text("contact = 7\n")
    with pytest.raises(ConfigError, match="contact is not a text"):
        read_details(file)
    with pytest.raises(InputError, match="no such file"):
        read_details(tmp_path / "none.toml")


def shown(found: dict[str, Any]) -> str:
    return markdown(dossier_content.build(found, {}))


def test_a_run_says_what_it_is(signed: Any) -> None:
    found = documents(signed[0])
    assert "NOT PRIVATE:" not in shown(found) and "A simulation" not in shown(found)
    assert "A simulation" in shown(found | {"simulated": True})
    report = found["report.json"]
    open_ = report | {"private": False, "privacy": {"mode": "off"}}
    text = shown(found | {"report.json": open_})
    assert "NOT PRIVATE:" in text and "There is no privacy guarantee" in text
    assert "ε, rounded up" not in text and "Updates leave a site without noise" in text
    declared = report | {"declared": {"north": "public", "south": "generated"}}
    text = shown(found | {"report.json": declared})
    assert "Not patients' data" in text and "No claim about patients" in text
    half = report | {"declared": {"north": "public"}}
    assert "Not patients' data" not in shown(found | {"report.json": half})
    assert "declared public" in shown(found | {"report.json": half})
    audited = shown(found | {"audit.md": True})
    assert "The run was audited" in audited and "No audit of this run" not in audited


def test_a_run_has_the_pictures_that_are_true_of_it(signed: Any) -> None:
    found = documents(signed[0])

    def names() -> set[str]:
        drawn = pictures.files(dossier_content.build(found, {}))
        return {Path(name).stem for name in drawn}

    own = {"data-line", "trust", "quality"}
    assert names() == own | {"round"}
    table = {"sites": 3, "colluding": 1, "fallback_epsilon": 9.5, "own_noise_multiplier": 0.9}
    for site in found["report.json"]["privacy"]["sites"].values():
        site["secure_aggregation"] = table
    assert names() == own | {"masked-round"}
    del found["report.json"]["quality"]["by_round"]
    assert names() == {"data-line", "trust", "masked-round"}
    found["report.json"]["private"] = False
    assert names() == set()


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_picture_speaks_of_the_unit_that_is_protected(unit: str) -> None:
    other = {"record": "patient", "patient": "record"}[unit]
    drawn = PICTURES["data-line"](unit).svg()
    assert f"one per {unit}<" in drawn and f"one per {other}<" not in drawn


def test_the_curve_is_the_reports_by_round(signed: Any) -> None:
    report = documents(signed[0])["report.json"]
    content = dossier_content.build(documents(signed[0]), {})
    blocks = [b for section in content["sections"] for b in section["blocks"]]
    points = next(b for b in blocks if b["kind"] == "curve")["points"]
    metric = report["quality"]["metric"]
    for (spent, reached), row, measured in zip(
        points, report["rounds"], report["quality"]["by_round"], strict=True
    ):
        assert float(spent["shown"]) >= max(row["epsilon"].values()) > float(spent["shown"]) - 1e-3
        assert float(reached["shown"]) == pytest.approx(measured[metric], rel=1e-3)


def test_two_measured_points_are_not_joined_and_public_text_alone_has_a_line(signed: Any) -> None:
    """A line between two ends would say how it went in between, which nobody measured. Twin: three
    points are joined."""
    ends = [(0.0, 0.1), (8.0, 0.9)]

    def joined(points: list[tuple[float, float]], start: float | None = None) -> int:
        return curve("accuracy", points, "ε", None, start).svg().count('class="leaves"')

    assert joined(ends) == 0 and joined([*ends[:1], (4.0, 0.5), *ends[1:]]) == 2
    assert "public alone" in curve("accuracy", ends, "ε", None, 0.85).svg()
    found = documents(signed[0])
    quality = found["report.json"]["quality"]
    metric = quality["metric"]
    quality |= {"start": {metric: 0.25}}
    quality["gain"]["over_start"] = [-0.5, 0.25]
    content = dossier_content.build(found, {})
    assert "what public text alone gives (0.25, for no ε)" in markdown(content)
    assert not find_contradiction(content, found)
    block = next(b for s in content["sections"] for b in s["blocks"] if b["kind"] == "curve")
    assert "0.25 by public text alone" in pictures.draw_block(block).alt


def test_a_dossiers_title_has_the_studys_name_in_quotes_and_says_what_the_records_were(
    signed: Any,
) -> None:
    """Twin: a run of a consortium, of records that nobody invented."""
    found = documents(signed[0])
    found["report.json"] |= {"study": "hospitals", "invented": True}
    invented = dossier_content.build({**found, "simulated": True}, {})
    for text in (markdown(invented), page(invented)):
        assert "Dossier of the study “hospitals”" in text and "Invented records" in text
        assert "--simulation" in text and "--trust FINGERPRINT" not in text
    found["report.json"]["invented"] = False
    other = markdown(dossier_content.build(found, {}))
    assert "Invented" not in other and "A simulation" not in other and "--trust" in other


def test_what_is_built_is_what_the_run_says(signed: Any) -> None:
    """Twin: another run's figures contradict it."""
    found = documents(signed[0])
    content = dossier_content.build(found, {})
    assert find_contradiction(content, found) == ""
    report = found["report.json"]
    other = report | {"privacy": report["privacy"] | {"epsilon": 0.5}}
    assert "report.json#/privacy" in find_contradiction(content, found | {"report.json": other})


def test_no_text_claims_that_a_law_is_met() -> None:
    told = [*dossier_content.sections(), *assurance.package_sections()]
    texts = json.dumps(told, ensure_ascii=False).lower()
    assert "complian" not in texts and "conforms" not in texts and "certified" not in texts


def test_the_card_is_one_of_the_hubs(released: Any) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(released[0] / "README.md")
    report = documents(released[0] / "run")["report.json"]
    assert card.data.library_name == "peft" and "differential-privacy" in card.data.tags
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values == {k: v for k, v in report["quality"]["after"].items() if k != "round"}
    assert "Not a medical device" in card.text and CONTACT.split("<")[0] in card.text


def test_the_bill_of_materials_says_what_was_recorded(released: Any) -> None:
    bill = json.loads((released[0] / "sbom.cdx.json").read_text())
    versions = documents(released[0] / "run")["report.json"]["ran"]["versions"]
    parts = {part["name"]: part for part in bill["components"]}
    for name in ("torch", "flwr", "fedtune"):
        assert parts[name]["version"] == versions[name]
        assert parts[name]["properties"][0]["value"] == RECORDED
    assert parts["numpy"]["properties"][0]["value"] == INSTALLED
    refs = [part["bom-ref"] for part in bill["components"]]
    assert len({*refs}) == len(refs) and bill["dependencies"][0]["dependsOn"] == refs


@pytest.mark.skipif(
    importlib.util.find_spec("cyclonedx") is None, reason="cyclonedx-python-lib is not installed"
)
def test_the_bill_of_materials_fits_its_schema(released: Any) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    text = (released[0] / "sbom.cdx.json").read_text()
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"library"', '"book"')) is not None


@pytest.mark.skipif(not openssf.can_sign(), reason="model-signing is not installed")
@pytest.mark.filterwarnings("ignore")
def test_openssfs_tool_verifies_the_weights_by_the_key_that_the_release_names(
    released: Any, tmp_path: Path
) -> None:
    from model_signing import verifying

    folder = shutil.copytree(released[0], tmp_path / "dossier")
    assert {openssf.SIGNATURE, openssf.PUBLIC} <= {*seal.read_release(folder)[0]["files"]}
    key, signature = folder / openssf.PUBLIC, folder / openssf.SIGNATURE
    tool = verifying.Config().use_elliptic_key_verifier(public_key=key)
    tool.verify(folder / "run" / "adapter", signature)
    weights = folder / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="mismatch"):
        tool.verify(folder / "run" / "adapter", signature)


def test_no_path_of_the_coordinators_machine_is_on_a_page(released: Any) -> None:
    name = documents(released[0] / "run")["report.json"]["base"]["name"]
    assert Path(name).is_absolute()
    files = ["README.md", "dossier.html", "dossier.json", "dossier.md", "sbom.cdx.json"]
    files += ["assurance.html", "assurance.json", "registry.yaml", "ro-crate-metadata.json"]
    for file in files:
        assert name not in (released[0] / file).read_text(), file


class Outline(html.parser.HTMLParser):
    """Headings, landmarks, references and tables of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.headings, self.tags, self.references = list[int](), list[str](), list[str]()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        self.references += [v for k, v in attrs if k in ("src", "href", "action", "data") and v]


@pytest.mark.parametrize("name", ["dossier.html", "assurance.html"])
def test_the_page_asks_for_nothing_and_is_read_without_eyes_or_mouse(
    released: Any, name: str
) -> None:
    text = (released[0] / name).read_text()
    outline = Outline()
    outline.feed(text)
    assert not {"script", "link", "iframe", "form", "object"} & {*outline.tags}
    assert all(ref.startswith(("#", "data:image/svg+xml;base64,")) for ref in outline.references)
    assert "url(" not in text and "@import" not in text
    assert {"header", "nav", "main", "footer"} <= {*outline.tags}
    assert outline.headings[0] == 1 and outline.headings.count(1) == 1
    pairs = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in pairs)
    assert ("html", {"lang": "en"}) in outline.attributes
    assert all(a.get("scope") for tag, a in outline.attributes if tag == "th")
    assert all(a.get("alt") for tag, a in outline.attributes if tag == "img")
    assert outline.tags.count("table") == outline.tags.count("caption")
    ids = [a["id"] for _, a in outline.attributes if "id" in a]
    assert {r[1:] for r in outline.references if r.startswith("#")} <= {*ids}


def test_what_a_person_or_a_site_wrote_is_inert(signed: Any) -> None:
    bad = "<script>alert(1)</script> | **x** [a](http://e.vil)"
    found = documents(signed[0])
    found["report.json"] |= {"study": bad}
    content = dossier_content.build(found, {"contact": bad})
    assert "<script>" not in page(content) and "<script>" not in markdown(content)
    assert "[a](http" not in markdown(content)
    assert any(fact["shown"].startswith("<script>") for fact in facts_in(content))
