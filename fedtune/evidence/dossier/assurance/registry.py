"""Describe a private run in the form of OpenDP's Deployments Registry: registry.yaml.

The registry is a public list of uses of differential privacy (opendp/deployments-registry-data);
its schema says what the fields mean. Fields that the run determines are filled in here. Every other
field says that a person must fill it in, so the file fits the schema but is a draft, not an
entry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedtune.core.registry.rounding import rounded_up
from fedtune.evidence.dossier.content import WHEN, Documents
from fedtune.evidence.dossier.facts import base_name, show
from fedtune.evidence.dossier.markdown import TO_FILL
from fedtune.report.claim import assumptions, fallback, limits, protects
from fedtune.report.teacher import teacher_left_out_line

FILE = "registry.yaml"
SECTION = "registry"  # the section whose blanks are this file's
ACTORS = """\
- Patients, or whom else the records are about: their hospital holds the records, as before.
- Each site: trusted with its own records alone. It clips, adds noise and accounts for ε itself.
- The coordinator and other sites: not trusted with privacy. They see noised updates,
  or sums of masked ones, and the adapter of each round.
- Whoever uses the released model: not trusted. The model is a function of noised updates."""


def registry(found: Documents, typed: Mapping[str, str], made: str) -> str:
    """Return the text of registry.yaml for a private run.

    - found: the run's documents by file name
    - typed: a blank's key -> the text that a person typed into the blank
    - made: when the dossier was signed, UTC; this is entered as the day of publication, until a
      person enters another"""
    import yaml  # type: ignore[import-untyped]

    entry = _entry(found, typed, made)
    return str(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=2**20))


def _entry(found: Documents, typed: Mapping[str, str], made: str) -> dict[str, Any]:
    report = found["report.json"]
    privacy = report["privacy"]
    sites = ", ".join(sorted(found["evidence.json"]["sites"]))
    continuous = WHEN["continuous"](found)

    def said(name: str, what: str) -> str:
        return typed.get(name, "").strip() or f"{TO_FILL}: {what}"

    def own(name: str, what: str) -> str:
        return said(f"{SECTION}/{name}", what)

    return {
        "url_slug": re.sub(r"[^a-z0-9]+", "-", str(report["study"]).lower()).strip("-") or "study",
        "status": "Draft",
        "tier": 2,
        "deployment": {
            "basic": {
                "name": str(report["study"]),
                "data_curators": [own("data_curators", "who publishes the model")],
                "intended_use": said("intended_use", "what the model is for"),
                "data_product_type": "Machine learning model",
                "data_product_region": own("data_product_region", "region, or its law"),
                "description": (
                    f"A language model, fine-tuned with the objective "
                    f"{report['objective']['name']} at the sites {sites}, whose records stayed "
                    f"with them. Base: {base_name(str(report['base']['name']))}."
                ),
                "publication_date": made[:10],
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": (
                    "Records that a site's own configuration admits, in the columns that it names."
                ),
                "unprotected_quantities": _unprotected(found),
            },
            "privacy_loss": {
                "privacy_unit": protects(str(privacy["unit"])),
                "privacy_unit_details": (
                    f"Neighbouring data sets of a site: {show(privacy.get('relation'), 'plain')}."
                ),
                "privacy_parameters": {
                    "epsilon": float(rounded_up(privacy["epsilon"])),
                    "delta": privacy["delta"],
                },
                "privacy_parameters_details": _parameters(report),
            },
            "deployment_model": {
                "model_name": "Federated",
                "model_name_details": (
                    "Noise is added at each site, before anything leaves it; the coordinator "
                    "combines noised updates."
                ),
                "actors": ACTORS,
                "release_type": "Many releases" if continuous else "One release",
                "data_source_type": "Dynamic" if continuous else "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "post_processing": "Averaging of the updates, rounding, and choice of a model.",
                "composition": (
                    f"Over all noised steps of a site, by {privacy['accountant']}; over studies, "
                    "each site's own ledger."
                ),
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": own(
                    "tuning", "how settings were chosen, and whether private records were looked at"
                ),
                "mechanisms": _mechanisms(report, privacy),
            },
            "administrative": {
                "sources": f"The run's signed dossier; plan {report['plan_digest']}.",
                "registry_authors": [own("registry_authors", "who filled this entry")],
            },
        },
    }


def _unprotected(found: Documents) -> str:
    report = found["report.json"]
    told = [
        "That a site took part, its declared size, and when its messages came.",
        *limits(str(report["privacy"]["unit"]), WHEN["shared"](found)),
    ]
    if WHEN["free query"](found):
        names = ", ".join(sorted(report["free_query"]))
        told.append(
            f"What is read of one patient, where another's rows change it in a query or a view: "
            f"at {names}."
        )
    return "\n".join(f"- {text}" for text in told)


def _parameters(report: dict[str, Any]) -> str:
    """Return sentences on the run's ε. report: the content of report.json. The sentences say:

    - over which sites and rounds ε is taken
    - if the sites share noise: under which assumption ε holds, and which larger ε holds without it
    - if queries were answered: the ε for somebody who is also among the held-out records
    - if the cost of the run's teacher is not in ε: that it is not, and why"""
    privacy = report["privacy"]
    told = ["ε is the largest of the sites', rounded up, over all rounds."]
    if alone := fallback(privacy):
        told.append(
            f"It holds if {assumptions(alone)}; whatever happens, each site's own noise gives ε = "
            f"{rounded_up(alone['epsilon'])}."
        )
    if asked := privacy.get("evaluation"):
        told.append(
            "For somebody who is also among the held-out records that were asked about, ε = "
            f"{rounded_up(asked['with_training'])}."
        )
    told += [said] if (said := teacher_left_out_line(report)) else []
    return " ".join(told)


def _mechanisms(report: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    """Describe the privacy mechanism as a text with a line for each site: its number of steps,
    clipping norm, noise and sampling rate. The report took these from the site's step log.

    report: the content of report.json; privacy: its table "privacy"."""
    lines = [
        f"- {name}: {site['steps']} steps with gradients clipped to C = "
        f"{show(site.get('max_grad_norm'), 'plain')} and Gaussian noise of σ = "
        f"{show(site.get('noise_multiplier'), 'plain')} C, sampling rate "
        f"{show(site.get('sampling_rate'), 'plain')}"
        for name, site in sorted(privacy["sites"].items())
    ]
    first = f"DP-SGD ({privacy['clipping']} clipping) by fedtune {report['fedtune']}."
    return "\n".join([first, *lines])
