"""Verify a run's folder: offline, without torch, without trust in who handed it over.

    signature.json ── names the sha256 of ──> adapter, plan, report, evidence.json
    evidence.json  ── holds of each update ─> the site's signature over plan, round and step log
    step logs      ── give ─────────────────> ε, which must be the report's
    --trust        ── is the fingerprint of ─> the coordinator's key and the consortium's CA

Errors: NotGenuine for whatever contradicts itself, with what and where; Refused where everything
agrees and the signer is another one than the trusted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fedtune.config import PrivacyTable, Study
from fedtune.dp.accountant import Steps, epsilon
from fedtune.errors import InputError, Refused
from fedtune.evidence.sign import (
    ADAPTER,
    EVIDENCE,
    FORMAT,
    PURPOSE,
    RUN,
    SIGNATURE,
    UNSIGNED,
    VERSIONS,
    covered,
)
from fedtune.files import reading
from fedtune.run_folder import load_plan, read_report
from fedtune.wire import fingerprints, seal, step_summary
from fedtune.wire.keys import canonical, verifies

MALFORMED = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
SAME = 1e-9  # relative: two computations of one ε
LARGE = 1 << 28  # bytes of evidence.json
TODO = "get the folder again from who signed it; do not use this one"


class NotGenuine(InputError):
    """A run's folder that contradicts its signatures."""


@dataclass(frozen=True)
class Verified:
    """What a run's folder proves.

    signer: the consortium's fingerprint, as its coordinator reads it out; trusted: whether it is
    the one that was asked for; simulated: whether no consortium's CA stands behind it; sites: each
    one's fingerprint ("" where it never enrolled), steps and ε; epsilon: the largest of them, None
    without privacy; not_signed: what else lies in the folder; declared: sites whose data the report
    calls public or generated; exported: whether the run was found inside an exported model, whose
    weights nobody signed."""

    study: str
    plan: str
    private: bool
    signer: str
    trusted: bool
    simulated: bool
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    updates: int = 0
    files: int = 0
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_signed: tuple[str, ...] = ()
    declared: dict[str, str] = field(default_factory=dict)
    exported: bool = False


def verify(run: Path | str, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a run, or that of an exported model: every signature, every digest, ε from the logs.

    trust: the consortium's fingerprint, as its coordinator reads it out ("": nobody is trusted, and
    the result says who signed); sites: fingerprints that sites read out, by name.

    >>> import fedtune
    >>> fedtune.verify_run("runs/none")
    Traceback (most recent call last):
      ...
    fedtune.evidence.verify.NotGenuine: ...

    Errors: NotGenuine (a file, a signature or a figure that does not fit), Refused (another signer
    than `trust`, or another site than `sites`), InputError, ConfigError (no run)."""
    run = Path(run)
    exported = (run / RUN).is_dir() and not is_signed(run)
    run = run / RUN if exported else run
    signed = _signature(run)
    _files(run, signed["files"])
    study, report = load_plan(run), read_report(run)
    content = _canonical(run / EVIDENCE, LARGE)
    events = _seals(run, content, study, signed["coordinator"], bool(signed["ca"]))
    rounds = _rounds(run, content, report)
    verified = Verified(
        study=study.study.name,
        plan=study.digest,
        private=study.private,
        signer=fingerprints.of_consortium(signed["ca"], signed["coordinator"]),
        trusted=False,
        simulated=not signed["ca"],
        updates=rounds,
        files=len(signed["files"]),
        not_signed=_not_signed(run),
        declared=report.get("declared") or {},
        exported=exported,
        **_privacy(run, study, report, content["sites"], events),
    )
    return _trusted(run, verified, trust, sites or {})


def signer(run: Path) -> str:
    """Return the fingerprint of who says to have signed a run, unverified; "" where nobody does."""
    try:
        content = _canonical(run / SIGNATURE)
        return fingerprints.of_consortium(str(content["ca"]), str(content["coordinator"]))
    except (NotGenuine, KeyError):
        return ""


def is_signed(run: Path) -> bool:
    """Return whether the folder claims to be signed, rightly or not."""
    return (run / SIGNATURE).exists() or (run / EVIDENCE).exists()


def _fail(where: Path | str, happened: str, expected: str = "") -> NoReturn:
    raise NotGenuine(f"{where}: {happened}", expected, TODO)


def _canonical(path: Path, most: int = reading.SMALL) -> dict[str, Any]:
    """Read JSON of which each content has one spelling."""
    data = reading.content(path, "the file as it was signed", TODO, NotGenuine, most)
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or canonical(content) != data:
            raise ValueError
    except MALFORMED:
        _fail(path, "was changed after it was signed", "canonical JSON")
    if content.get("format") != FORMAT:
        _fail(path, "is of another format", FORMAT)
    return content


def _signature(run: Path) -> dict[str, Any]:
    path = run / SIGNATURE
    if not run.is_dir():
        _fail(run, "no such folder", "a run's folder")
    if not path.exists():
        raise NotGenuine(
            f"{run}: is not signed",
            f"{SIGNATURE}, which a coordinator writes when a run ends",
            "a model that was made of other runs is verified by those; an unfinished run: --resume",
        )
    content = _canonical(path)
    kinds = {"format": str, "ca": str, "coordinator": str, "files": dict, "signature": str}
    if {name: type(value) for name, value in content.items()} != kinds:
        _fail(path, "is not what a coordinator signs")
    signature = content.pop("signature")
    if not verifies(content["coordinator"], PURPOSE + canonical(content), signature):
        _fail(path, "its signature does not fit", "the signature of the key that it names")
    return content


def _files(run: Path, files: Mapping[str, Any]) -> None:
    """Check that the files are those that were signed, and no other lies among the adapter's."""
    present = covered(run)
    for name in present:
        if name not in files:
            _fail(run / name, "was added after the signature", "the files that were signed")
    for name, digest in files.items():
        if name not in present:
            _fail(run / name, "is missing", "every file that was signed")
        if (run / name).is_symlink() or _sha256(run / name) != digest:
            _fail(run / name, "was changed after it was signed", f"sha256 {str(digest)[:16]}…")
    link = run / ADAPTER
    if link.is_symlink() and link.resolve().parent != (run / VERSIONS).resolve():
        _fail(link, "leads elsewhere", f"one of {VERSIONS}/")
    if not any(name.startswith((f"{ADAPTER}/", f"{VERSIONS}/")) for name in files):
        _fail(run / ADAPTER, "is not signed", "an adapter")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_signed(run: Path) -> tuple[str, ...]:
    known = {name.partition("/")[0] for name in covered(run)} | {SIGNATURE, ADAPTER}
    rest = sorted(path.name for path in run.iterdir() if path.name not in known)
    return (*rest, *(f"{VERSIONS}/{name}" for name in UNSIGNED if (run / VERSIONS / name).exists()))


Events = dict[str, list[dict[str, Any]]]


def _seals(
    run: Path, content: dict[str, Any], study: Study, coordinator: str, enrolled: bool
) -> dict[str, Events]:
    """Verify what every site signed; return the newest step log of each, by kind and site."""
    events: dict[str, Events] = {"update": {}, "answer": {}}
    digests = {"update": study.digest, "answer": study.queries_digest}
    if content.get("plan") != study.digest:
        _fail(run / EVIDENCE, "is of another plan", study.digest)
    try:
        for entry in content["updates"]:
            where = f"{run / EVIDENCE}, round {int(entry['round'])}, {str(entry['site'])[:64]!r}"
            key, kind = content["sites"][entry["site"]]["signing"], entry["kind"]
            receiver = json.loads(entry["header"])["receiver"]
            if enrolled and receiver != coordinator:
                _fail(where, "was sealed for another coordinator", "the one that signed the run")
            expected = seal.Header(
                plan=digests[kind],
                round=entry["round"],
                base=study.base.digest or "",
                site=entry["site"],
                receiver=receiver,
                nonce=json.loads(entry["header"])["nonce"],
                body=seal.digest_of(entry["arrays"], entry["said"]),
                ledger={},
            )
            try:
                seal.opened(entry, key, expected)
            except seal.SealError as error:
                _fail(where, error.happened, "what the site signed")
            log = step_summary.parse(entry["said"]["events"]) if study.private else []
            _grown(where, events[kind].get(entry["site"], []), log, study)
            events[kind][entry["site"]] = log
    except MALFORMED:
        _fail(run / EVIDENCE, "is not what a coordinator writes")
    return events


def _grown(where: str, before: list[Any], now: list[Any], study: Study) -> None:
    if study.private and sum(e["steps"] for e in now) <= sum(e["steps"] for e in before):
        _fail(where, "its step log has no step for this round", "a longer log in every round")


def _rounds(run: Path, content: dict[str, Any], report: dict[str, Any]) -> int:
    """Check that who took part by the report is who signed; return the number of updates."""
    signed: dict[Any, list[str]] = {}
    updates = [entry for entry in content["updates"] if entry["kind"] == "update"]
    for entry in updates:
        signed.setdefault(entry["round"], []).append(entry["site"])
    try:
        said = {row["round"]: sorted(row["participants"]) for row in report["rounds"]}
    except MALFORMED:
        _fail(run / "report.json", "is not what a coordinator writes")
    for number in sorted({*said, *signed}):
        if said.get(number) != sorted(signed.get(number, [])):
            _fail(
                run / "report.json",
                f"who took part in round {number} is not who signed an update of it",
            )
    return len(updates)


def _privacy(
    run: Path,
    study: Study,
    report: dict[str, Any],
    keys: Mapping[str, Mapping[str, str]],
    events: dict[str, Events],
) -> dict[str, Any]:
    """Compute ε from the step logs, and check that the report says the same."""
    path = run / "report.json"
    shown: dict[str, dict[str, Any]] = {
        name: {"fingerprint": _site_fingerprint(name, keys[name]), "key": keys[name]["signing"]}
        for name in sorted(events["update"])
    }
    if report.get("private") is not study.private:
        _fail(
            path, "says that it is private" if report.get("private") else "says it is not private"
        )
    privacy = study.privacy
    if not isinstance(privacy, PrivacyTable):
        return {"sites": shown}
    said = report["privacy"]
    spent = {name: _epsilon(log, study, privacy) for name, log in events["update"].items()}
    _agree(path, "privacy.delta", said.get("delta"), privacy.delta)
    if said.get("unit") != privacy.unit:
        _fail(path, "privacy.unit is not the plan's", privacy.unit)
    _agree(path, "privacy.epsilon", said.get("epsilon"), max(spent.values(), default=0.0))
    if sorted(said.get("sites") or {}) != sorted(spent):
        _fail(path, "names other sites than those that signed")
    for name, value in spent.items():
        site = said["sites"][name]
        _agree(path, f"{name}'s epsilon", site.get("epsilon"), value)
        steps = sum(event["steps"] for event in events["update"][name])
        _agree(path, f"{name}'s steps", site.get("steps"), steps)
        if site.get("key") != keys[name]["signing"]:
            _fail(path, f"{name}'s key is not the one that signed")
        shown[name] |= {"epsilon": value, "steps": steps}
    for name, log in events["answer"].items():
        answers = ((said.get("evaluation") or {}).get("sites") or {}).get(name) or {}
        _agree(path, f"{name}'s evaluation", answers.get("epsilon"), _steps_epsilon(log, privacy))
    largest = max(spent.values(), default=0.0)
    return {"sites": shown, "epsilon": largest, "delta": privacy.delta, "unit": privacy.unit}


def _epsilon(log: list[dict[str, Any]], study: Study, privacy: PrivacyTable) -> float:
    spent = _steps_epsilon(log, privacy)
    if study.continuous and privacy.epsilon is not None:  # a site then leaves the patient out
        return min(spent, privacy.epsilon)
    return spent


def _steps_epsilon(log: list[dict[str, Any]], privacy: PrivacyTable) -> float:
    steps = [Steps(e["sigma"], e["q"], e["steps"], e["records"]) for e in log]
    return epsilon(steps, privacy.delta)


def _agree(path: Path, what: str, said: Any, computed: float) -> None:
    number = isinstance(said, int | float) and not isinstance(said, bool)
    if not number or not math.isclose(said, computed, rel_tol=SAME):
        _fail(
            path,
            f"{what} is {str(said)[:24]}",
            f"{computed:.6g}, which follows from the sites' step logs",
        )


def _site_fingerprint(name: str, keys: Mapping[str, str]) -> str:
    if "node" not in keys:
        return ""
    return fingerprints.of_site(name, keys["node"], keys["tls"], keys["signing"])


def _trusted(run: Path, found: Verified, trust: str, sites: Mapping[str, str]) -> Verified:
    for name, fingerprint in sites.items():
        signed = found.sites.get(name, {}).get("fingerprint", "")
        if not signed or not fingerprints.equal(signed, fingerprint):
            raise Refused(
                f"{run}: {name!r} signed with keys of fingerprint {signed or 'unknown'}",
                fingerprint,
                "ask the site for the fingerprint that `fedtune enroll` showed",
            )
    if not trust:
        return found
    if not fingerprints.equal(trust, found.signer):
        raise Refused(
            f"{run}: was signed by {found.signer}",
            trust,
            "ask the coordinator for its consortium's fingerprint; do not use this folder",
        )
    return Verified(**(found.__dict__ | {"trusted": True}))
