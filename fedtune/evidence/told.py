"""Read and write the statements in which sites report their decision about a model: "accepted",
"refused" or "not resolved".

    RUN/told/*.json    statements that the coordinator received and put there

A statement names site, plan, model and time, and is signed by the key that signed the site's
updates. It holds no figure, no threshold and no number of patients. A site without a statement has
reported no decision. Sites are listed by name, never by how well the model does there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError, NotGenuine
from fedtune.core.files import reading
from fedtune.core.run_folder import ADAPTER, load_plan
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence.sign import EVIDENCE, sha256
from fedtune.evidence.signed_files import signed_json

FORMAT, FOLDER = "fedtune-told-1", "told"
PURPOSE = b"fedtune told\0"
DECISIONS = ("accepted", "refused", "not resolved")
KEYS = {"format", "site", "decision", "time", "plan", "adapter", "key", "signature"}
MOST = 1000  # largest number of statements of a run
LARGE = 1 << 28  # bytes of evidence.json


@dataclass(frozen=True)
class Told:
    """One statement of a site about a model.

    - file: the name of its file
    - site: the site that signed it; "" if it is not known who did
    - decision, time: what the site decided, and when; both are "" if the statement does not count
    - problem: why the statement does not count for this model; "" if it counts"""

    file: str
    site: str = ""
    decision: str = ""
    time: str = ""
    problem: str = ""


def digest_of_adapter(run: Path) -> str:
    """Compute a digest over all files of a run's adapter, in hexadecimal. Errors: OSError if one
    cannot be read."""
    files = {p.name: sha256(p) for p in sorted((run / ADAPTER).iterdir()) if p.is_file()}
    return hashlib.sha256(canonical(files)).hexdigest()


def state(record: dict[str, Any], key: SigningKey) -> bytes:
    """Compose and sign the statement of a site's decision about a model. Return the content of the
    statement's file, canonical JSON.

    - record: the decision as the site stored it; site, decision, time and the model's digests are
      used
    - key: the site's signing key"""
    model = record["model"]
    body = {
        "format": FORMAT,
        "site": record["site"],
        "decision": record["decision"],
        "time": record["time"],
        "plan": model["plan"],
        "adapter": model["adapter"],
        "key": key.public,
    }
    return canonical(body | {"signature": key.sign(PURPOSE + canonical(body))})


def read_told(run: Path) -> list[Told]:
    """Read the sites' statements about a run's model. Return them sorted by the site's name; [] if
    there are none. A statement that does not count is in the list too, with the reason in its
    `problem`."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix == ".json")[:MOST]
    try:
        plan, adapter = load_plan(run).digest, digest_of_adapter(run)
        sites = reading.json_in(run / EVIDENCE, "a signed run", most=LARGE)["sites"]
        keys = {name: site["signing"] for name, site in sites.items()}
    except (FedtuneError, OSError, KeyError, TypeError, AttributeError):
        return [Told(path.name, problem="the run is not finished, or not signed") for path in files]
    found = [_read(path, plan, adapter, keys) for path in files]
    return sorted(found, key=lambda one: (not one.site, one.site, one.time, one.file))


def _read(path: Path, plan: str, adapter: str, keys: dict[str, str]) -> Told:
    """Read one site's statement about a run's model. If it does not count, the `problem` of the
    result says why.

    - path: the statement's file
    - plan, adapter: the digests of the run's plan and of its adapter, which the statement must name
    - keys: site -> the public key that signed the site's updates"""
    try:
        content, _ = signed_json(path, FORMAT)
    except NotGenuine:
        return Told(path.name, problem="no statement of a site")
    texts = all(isinstance(value, str) for value in content.values())
    if {*content} != KEYS or not texts or content["decision"] not in DECISIONS:
        return Told(path.name, problem="no statement of a site")
    body = {name: value for name, value in content.items() if name != "signature"}
    site, key = content["site"], content["key"]
    if keys.get(site) != key or not verifies(key, PURPOSE + canonical(body), content["signature"]):
        return Told(path.name, problem="not signed by a site that took part")
    if (content["plan"], content["adapter"]) != (plan, adapter):
        return Told(path.name, site, problem="of another model than this run's")
    return Told(path.name, site, content["decision"], content["time"])


def lines(told: Sequence[Told]) -> list[str]:
    """Describe for people what each site's statement says about the run's model: one line for each
    statement; [] if there are none."""
    if not told:
        return []
    said = [
        f"{one.site}: {one.decision}, told by a person there ({one.time})"
        if not one.problem
        else f"{one.site or one.file}: {one.problem}"
        for one in told
    ]
    return [*said, "of a site that is not listed nobody told anything"]
