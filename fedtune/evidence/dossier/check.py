"""Verify a dossier: its files and its signature, the run in it, each fact (by comparing it with the
run), and the approvals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.core.errors import NotGenuine, Refused
from fedtune.core.files import reading
from fedtune.evidence import fingerprints
from fedtune.evidence.dossier import pictures
from fedtune.evidence.dossier.assurance import crate, pack
from fedtune.evidence.dossier.assurance.registry import FILE as REGISTRY
from fedtune.evidence.dossier.assurance.registry import registry
from fedtune.evidence.dossier.assurance.sections import ATTACKS, FOLDER, all_sections
from fedtune.evidence.dossier.card import card
from fedtune.evidence.dossier.content import FORMAT, build, dump_content
from fedtune.evidence.dossier.facts import documents, find_contradiction, numbers
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.dossier.page import page
from fedtune.evidence.dossier.seal import (
    APPROVALS,
    AUDIT,
    CONTENT,
    RELEASE,
    approvals,
    check_files,
    read_release,
)
from fedtune.evidence.sign import RUN
from fedtune.evidence.signed_files import MALFORMED, TODO, fail
from fedtune.evidence.verify import Verified, verify_run


def check(folder: Path, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a dossier. Return a Verified, which says by whom it was signed, what was compared, and
    who approved it.

    - folder: the dossier's folder
    - trust: the consortium's fingerprint, which the signer must have; "": any signer is accepted
    - sites: site -> the fingerprint that it read out; None: no site's keys are compared

    Errors: NotGenuine if something was changed, or a figure is not the run's; Refused if the signer
    does not have the fingerprint `trust`, or a site's keys do not fit `sites`; InputError."""
    if not (folder / RELEASE).exists():
        raise NotGenuine(f"{folder}: is a dossier that is not signed", RELEASE, TODO)
    signed, digest = read_release(folder)
    name = fingerprints.of_consortium(signed["ca"], signed["coordinator"])
    if trust and not fingerprints.match_fingerprints(trust, name):
        raise Refused(
            f"{folder}: was signed by {name}",
            trust,
            "ask the coordinator for its consortium's fingerprint; do not use this folder",
        )
    check_files(folder, signed["files"], signed["sizes"])
    found = verify_run(folder / RUN, sites=sites)
    # A simulation's key is not stored, so its dossier has another key, which signs the run's files.
    if signed["ca"] and not fingerprints.match_fingerprints(found.signer, name):
        fail(folder / RUN, f"was signed by {found.signer}", f"{name}, who signed the dossier")
    if not signed["ca"] and not found.simulated:
        fail(folder / RELEASE, "is signed as a simulation's", "the run's own coordinator")
    compared = _pages(folder, signed)
    outside = [name for name in signed["files"] if not name.startswith(f"{RUN}/")]
    by_key = {site["key"]: site_name for site_name, site in found.sites.items()}
    approved = [_describe_approval(body, by_key) for body in approvals(folder, digest)]
    dossier = {
        "files": len(signed["files"]),
        "made": signed["made"],
        "made by": signed["fedtune"],
        "word by word": signed["fedtune"] == __version__,
        "its word": [name for name in outside if name not in compared],
        "run signed by": found.signer,
        "approvals": approved,
    }
    known = {name.partition("/")[0] for name in signed["files"]} | {RELEASE, APPROVALS}
    rest = sorted(path.name for path in folder.iterdir() if path.name not in known)
    return replace(
        found,
        signer=name,
        trusted=bool(trust and signed["ca"]),
        dossier=dossier,
        not_signed=tuple(rest),
    )


def _pages(folder: Path, signed: Mapping[str, Any]) -> list[str]:
    """Compare every figure of a dossier with the run, and every page with the text that this
    release of fedtune composes from the run. Return the names of the files whose whole text is
    confirmed in this way. folder: the dossier's folder; signed: the content of release.json.

    If another release of fedtune wrote the dossier, its texts cannot be composed again, and [] is
    returned. Then only its facts are looked up in the run, and the numbers in its pages are
    compared with the numbers that its own facts give. This finds changes that were made after
    signing. It does not find other figures that the signer put into the texts, or facts that the
    signer left out."""
    path, same_release = folder / CONTENT, signed["fedtune"] == __version__
    text = reading.text(path, "the dossier's content", TODO, NotGenuine, reading.LARGE)
    content = reading.json_in(path, "the dossier's content", TODO, NotGenuine)
    if content.get("format") != FORMAT:
        fail(path, "is of another format", FORMAT)
    found: dict[str, Any] = documents(folder / RUN) | {
        name: reading.json_in(folder / name, "what an attack found", TODO, NotGenuine)
        for name in ATTACKS
        if name in signed["files"]
    }
    try:
        if wrong := find_contradiction(content, found):
            fail(path, f"says {wrong}", "what the run says")
        assurance = _read_pack(folder, signed, found)
        typed = _collect_typed(assurance, content)
        if same_release:
            found |= {"simulated": not signed["ca"]}
            found |= {AUDIT: True} if (folder / AUDIT).is_file() else {}
            content = build(found, typed)
            if text != dump_content(content):
                fail(path, "is not what fedtune writes of this run", "release the run again")
        written = {
            "dossier.md": markdown(content),
            "dossier.html": page(content),
            "README.md": card(content, found, folder / RUN),
        }
        if same_release:
            written |= _pack_again(folder, signed, found, typed)
        elif assurance:
            written |= {pack.PAGE: pack.pack_page(assurance)}
        drawings = pictures.files(content)
    except MALFORMED:
        fail(path, "is not what a coordinator writes")
    for name in signed["files"]:
        if name in pictures.FILES and name not in drawings:
            fail(folder / name, "is a picture that no page shows", "only pictures of the pages")
    compared = written | (drawings if same_release else {})
    for name, expected in compared.items():
        shown = reading.text(folder / name, "a dossier's page", TODO, NotGenuine, reading.LARGE)
        same = shown == expected if same_release else numbers(shown) == numbers(expected)
        if not same:
            fail(folder / name, "is not what fedtune writes of this run", "release the run again")
    return [CONTENT, *compared] if same_release else []


def _read_pack(folder: Path, signed: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Read the assurance pack and check each of its facts. Return the content of assurance.json; {}
    for a dossier without a pack, as earlier releases wrote it.

    folder: the dossier's folder; signed: the content of release.json; found: the documents of the
    run and of attacks on it, by file name. Errors: NotGenuine if a fact is not the run's, or the
    file is not an assurance pack's."""
    path = folder / pack.JSON
    if pack.JSON not in signed["files"]:
        return {}
    content = reading.json_in(path, "an assurance pack", TODO, NotGenuine)
    if content.get("format") != pack.FORMAT:
        fail(path, "is of another format", pack.FORMAT)
    if wrong := find_contradiction(content, found):
        fail(path, f"says {wrong}", "what the run says")
    return content


def _pack_again(
    folder: Path, signed: Mapping[str, Any], found: Mapping[str, Any], typed: Mapping[str, str]
) -> dict[str, str]:
    """Compose the texts of the assurance pack from the run again, as `release` does, so that they
    can be compared with the dossier's. Return file name -> text.

    - folder: the dossier's folder; if it has a folder with a hospital's own sections, they are read
    - signed: the content of release.json, of which the names of the files and the time are used
    - found: the documents of the run and of attacks on it, by file name
    - typed: a blank's key -> the text that a person typed into it, as the dossier shows it"""
    own = folder / FOLDER
    names = {*signed["files"], RELEASE}
    content = pack.build_pack(found, typed, all_sections(own if own.is_dir() else None), names)
    private = found["report.json"]["private"]
    entry = {REGISTRY: registry(found, typed, signed["made"])} if private else {}
    return {
        pack.JSON: pack.dump(content),
        pack.PAGE: pack.pack_page(content),
        crate.FILE: crate.crate(found, typed, signed["files"], signed["made"]),
        **entry,
    }


def _collect_typed(assurance: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, str]:
    """Collect what persons typed into a dossier's blanks. Return blank's key -> text.

    - assurance: the content of assurance.json; {} without an assurance pack
    - content: the content of dossier.json"""
    rows = [row for section in assurance.get("sections", []) for row in section["rows"]]
    blocks = [block for section in content["sections"] for block in section["blocks"]]
    blanks = [*(row for row in rows if "blank" in row), *(b for b in blocks if "blank" in b)]
    return {str(blank["blank"]): str(blank["typed"]) for blank in blanks}


def _describe_approval(body: Mapping[str, Any], by_key: Mapping[str, str]) -> dict[str, Any]:
    """Describe an approval. Return a dict of its "name", "role", "reason" and "date", the
    "fingerprint" of the key that signed it, and "site": the name of the site whose key this is, or
    "" for a person's own key.

    body: the approval's signed content; by_key: the key with which a site signed its updates -> the
    site's name."""
    shown = {key: body[key] for key in ("name", "role", "reason", "date")}
    key = str(body["key"])
    return shown | {"fingerprint": fingerprints.of_approver(key), "site": by_key.get(key, "")}
