"""Describe a dossier as an RO-Crate: ro-crate-metadata.json, plain JSON-LD without a library.

The crate follows RO-Crate 1.1 and the profile Process Run Crate 0.5: it names a program, one
execution of it, its inputs and its results. No profile for federated learning exists, and this
crate does not define one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from fedtune.core.run_folder import ADAPTER
from fedtune.evidence.dossier.content import Documents
from fedtune.evidence.dossier.facts import base_name
from fedtune.evidence.dossier.markdown import TO_FILL
from fedtune.evidence.sign import RUN

FILE = "ro-crate-metadata.json"
CONTEXT = "https://w3id.org/ro/crate/1.1/context"
CRATE = "https://w3id.org/ro/crate/1.1"
PROCESS = "https://w3id.org/ro/wfrun/process/0.5"
SOFTWARE = "https://pypi.org/project/fedtune/"
LICENCE = "ro-crate/licence"  # the key of the blank into which a person types the licence
FORMATS = {
    **{".json": "application/json", ".jsonl": "application/jsonl", ".html": "text/html"},
    **{".md": "text/markdown", ".yaml": "application/yaml", ".toml": "application/toml"},
    **{".pub": "application/x-pem-file", ".sig": "application/json"},
    **{".svg": "image/svg+xml", ".png": "image/png", ".pdf": "application/pdf"},
}


def crate(found: Documents, typed: Mapping[str, str], names: Iterable[str], made: str) -> str:
    """Return the text of ro-crate-metadata.json.

    - found: the run's documents by file name
    - typed: a blank's key -> the text that a person typed into the blank; only the licence is used
    - names: the dossier's signed files; ro-crate-metadata.json may be among them, and is left out
    - made: when the dossier was signed, UTC, as `format_now` writes it"""
    report = found["report.json"]
    files = [_file(name) for name in sorted({*names} - {FILE})]
    weights = f"{RUN}/{ADAPTER}/"
    sites = sorted(found["evidence.json"]["sites"])
    ran = report.get("ran") or {}
    licence = typed.get(LICENCE, "").strip() or f"{TO_FILL}: the licence of this folder"
    graph: list[dict[str, Any]] = [
        _entity(FILE, "CreativeWork", conformsTo=_ref(CRATE), about=_ref("./")),
        _entity(
            "./",
            "Dataset",
            name=f"Dossier of the study {report['study']}",
            description="A fine-tuning run across sites, with what protects whom, and its papers.",
            author=_ref("#coordinator"),
            datePublished=_moment(made),
            license=_ref("#licence"),
            conformsTo=_ref(PROCESS),
            mentions=_ref("#run"),
            hasPart=[_ref(weights), *(_ref(one["@id"]) for one in files)],
        ),
        _entity(PROCESS, "CreativeWork", name="Process Run Crate", version="0.5"),
        _entity("#licence", "CreativeWork", name="Licence", description=licence),
        _entity(
            SOFTWARE,
            "SoftwareApplication",
            name="fedtune",
            url=SOFTWARE,
            softwareVersion=str(report.get("fedtune", "")),
        ),
        _entity(
            "#run",
            "CreateAction",
            name=f"Training of the study {report['study']}",
            description=f"{len(report.get('rounds') or [])} rounds of plan {report['plan_digest']}",
            instrument=_ref(SOFTWARE),
            object=[_ref("#base"), _ref(f"{RUN}/plan.json")],
            result=_ref(weights),
            agent=_ref("#coordinator"),
            participant=[_ref(f"#site-{quote(name)}") for name in sites],
            startTime=_moment(ran.get("began")),
            endTime=_moment(ran.get("ended")),
            actionStatus="http://schema.org/CompletedActionStatus",
        ),
        _entity(
            "#base",
            "CreativeWork",
            name=base_name(str(report["base"]["name"])),
            identifier=report["base"].get("digest"),
        ),
        _entity("#coordinator", "Organization", name="the consortium's coordinator"),
        *(_entity(f"#site-{quote(name)}", "Organization", name=name) for name in sites),
        _entity(weights, "Dataset", name="The trained weights"),
        *files,
    ]
    text = json.dumps({"@context": CONTEXT, "@graph": graph}, indent=1, ensure_ascii=False)
    return text + "\n"


def _entity(name: str, kind: str, /, **properties: Any) -> dict[str, Any]:
    known = {key: value for key, value in properties.items() if value not in (None, "", [])}
    return {"@id": name, "@type": kind, **known}


def _moment(time: str | None) -> str | None:
    """Return a time in UTC as the RO-Crate profile writes it, with "+00:00" in place of "Z". For
    None return None."""
    return time and time.replace("Z", "+00:00")


def _ref(name: str) -> dict[str, str]:
    return {"@id": name}


def _file(name: str) -> dict[str, Any]:
    suffix = name[name.rfind(".") :] if "." in name else ""
    kind = FORMATS.get(suffix, "application/octet-stream")
    return _entity(quote(name), "File", name=name, encodingFormat=kind)
