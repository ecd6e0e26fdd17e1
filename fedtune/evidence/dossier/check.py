"""Verify a dossier: its files and signature, the run inside, each fact against it, who approved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.errors import Refused
from fedtune.evidence.dossier.card import card_body, measures
from fedtune.evidence.dossier.content import FORMAT
from fedtune.evidence.dossier.facts import card_values, contradicted, documents, numbers
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.dossier.page import page
from fedtune.evidence.dossier.seal import (
    APPROVALS,
    CONTENT,
    RELEASE,
    approvals,
    check_files,
    read_release,
)
from fedtune.evidence.figures import MALFORMED, TODO, fail
from fedtune.evidence.sign import RUN, NotGenuine
from fedtune.evidence.verify import Verified, verify_run
from fedtune.files import reading
from fedtune.wire import fingerprints


def check(folder: Path, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a dossier; see `fedtune.evidence.verify.verify`.

    Errors: NotGenuine, Refused, InputError."""
    if not (folder / RELEASE).exists():
        raise NotGenuine(f"{folder}: is a dossier that is not signed", RELEASE, TODO)
    signed, digest = read_release(folder)
    name = fingerprints.of_consortium(signed["ca"], signed["coordinator"])
    if trust and not fingerprints.equal(trust, name):
        raise Refused(
            f"{folder}: was signed by {name}",
            trust,
            "ask the coordinator for its consortium's fingerprint; do not use this folder",
        )
    check_files(folder, signed["files"], signed["sizes"])
    found = verify_run(folder / RUN, sites=sites)
    # A simulation's key is kept nowhere, so its dossier has another, which covers the run's files.
    if signed["ca"] and not fingerprints.equal(found.signer, name):
        fail(folder / RUN, f"was signed by {found.signer}", f"{name}, who signed the dossier")
    if not signed["ca"] and not found.simulated:
        fail(folder / RELEASE, "is signed as a simulation's", "the run's own coordinator")
    _facts(folder)
    by_key = {site["key"]: site_name for site_name, site in found.sites.items()}
    approved = [_shown(body, by_key) for body in approvals(folder, digest)]
    dossier = {
        "files": len(signed["files"]),
        "made": signed["made"],
        "run signed by": found.signer,
        "approvals": approved,
    }
    known = {name.partition("/")[0] for name in signed["files"]} | {RELEASE, APPROVALS}
    rest = sorted(path.name for path in folder.iterdir() if path.name not in known)
    return replace(found, signer=name, trusted=bool(trust), dossier=dossier, not_signed=tuple(rest))


def _facts(folder: Path) -> None:
    path = folder / CONTENT
    content = reading.json_in(path, "the dossier's content", TODO, NotGenuine)
    if content.get("format") != FORMAT:
        fail(path, "is of another format", FORMAT)
    found = documents(folder / RUN)
    try:
        wrong = contradicted(content, found)
        written = {
            "dossier.md": markdown(content),
            "dossier.html": page(content),
            "README.md": card_body(content, found),
        }
    except MALFORMED:
        fail(path, "is not what a coordinator writes")
    if wrong:
        fail(path, f"says {wrong}", "what the run says")
    for name, text in written.items():
        shown = reading.text(folder / name, "a dossier's page", TODO, NotGenuine, reading.LARGE)
        if numbers(shown) != numbers(text) or (name == "dossier.md" and shown[:1] != "#"):
            fail(folder / name, "shows other numbers than the run has", "those of dossier.json")
        if name == "README.md" and not _has_values(shown, found["report.json"]):
            fail(folder / name, "its head has other results than the run", "those of report.json")


def _has_values(shown: str, report: Mapping[str, Any]) -> bool:
    """Return whether a card's head gives what was measured after training, and nothing else."""
    after = (report.get("quality") or {}).get("after")
    measured = measures(after if isinstance(after, dict) else {}).values()
    try:
        return card_values(shown) == sorted(measured)
    except ValueError:
        return False


def _shown(body: Mapping[str, Any], by_key: Mapping[str, str]) -> dict[str, Any]:
    """Describe an approval: site: the site whose key signed it, which signed its updates too."""
    shown = {key: body[key] for key in ("name", "role", "reason", "date")}
    key = str(body["key"])
    return shown | {"fingerprint": fingerprints.of_approver(key), "site": by_key.get(key, "")}
