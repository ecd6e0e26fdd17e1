"""List the software that trained a run, as a bill of materials: sbom.cdx.json, CycloneDX 1.6."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from fedtune.core.config.known_bases import upstream_of
from fedtune.evidence.dossier.facts import base_name

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
RECORDED, INSTALLED = "recorded-by-run", "installed-at-release"
SOURCE = "fedtune:source"


def bill_of_materials(report: Mapping[str, Any]) -> dict[str, Any]:
    """Build a bill of materials of a run. It lists the software that the run's report recorded,
    further Python distributions that are installed here, and the base model. Return the content of
    sbom.cdx.json. report: the content of report.json.

    If a distribution is installed here in another version than the run recorded, the run's version
    is listed."""
    recorded = dict((report.get("ran") or {}).get("versions") or {})
    recorded.setdefault("fedtune", str(report.get("fedtune", "")))
    python = recorded.pop("python", None)
    components = [_library(name, version, RECORDED) for name, version in sorted(recorded.items())]
    named = {_normalise_name(name) for name in recorded}
    components += [
        _library(name, version, INSTALLED)
        for name, version in sorted(_list_installed().items())
        if name not in named
    ]
    if python:
        kind = {"type": "platform", "name": "python", "version": str(python)}
        components.append(kind | {"bom-ref": "python", "properties": _from(RECORDED)})
    components.append(_base(report["base"]))
    return {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "machine-learning-model",
                "bom-ref": "model",
                "name": str(report["study"]),
                "version": str(report["plan_digest"]),
            },
            "tools": {"components": [{"type": "application", "name": "fedtune release"}]},
        },
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": [c["bom-ref"] for c in components]}],
    }


def _list_installed() -> dict[str, str]:
    """List the Python distributions that are installed here: return a dict from name to version.
    The names are in their normal form (PEP 503)."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and distribution.version:
            found.setdefault(_normalise_name(name), distribution.version)
    return found


def _normalise_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _library(name: str, version: str, source: str) -> dict[str, Any]:
    normal = _normalise_name(name)
    locator = f"pkg:pypi/{normal}@{str(version).replace('+', '%2B')}"
    return {
        "type": "library",
        "bom-ref": locator,
        "name": normal,
        "version": str(version),
        "purl": locator,
        "properties": _from(source),
    }


def _from(source: str) -> list[dict[str, str]]:
    return [{"name": SOURCE, "value": source}]


def _base(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bill's entry for the base model. The base's digest is given as a property and not
    as a hash, since it is fedtune's own over all files of the base. base: the report's table
    "base"."""
    upstream = upstream_of(str(base["name"]))
    facts = {"fedtune:digest": base.get("digest"), "fedtune:dtype": base.get("dtype")}
    properties = [{"name": key, "value": str(value)} for key, value in facts.items() if value]
    component = {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": upstream.model if upstream else base_name(str(base["name"])),
        "properties": [*_from(RECORDED), *properties],
    }
    if base.get("licence"):
        component["licenses"] = [{"license": {"name": str(base["licence"])}}]
    return component
