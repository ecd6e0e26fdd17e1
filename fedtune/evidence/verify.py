"""Verify a run's folder offline, without torch, and without trust in the person who sent it.

    signature.json ── names the sha256 of ───> adapter, plan, report, evidence.json
    evidence.json  ── holds for each update ─> the site's signature over plan, round and step log
    step logs      ── give ──────────────────> ε, which must equal the report's
    --trust        ── is the fingerprint of ─> the coordinator's key and the consortium's CA

Errors: NotGenuine for any contradiction, with the file and field; Refused if everything agrees but
the signer is not the trusted one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError, NotGenuine, Refused
from fedtune.core.files import reading
from fedtune.core.run_folder import ADAPTER, SIGNATURE, load_plan
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence import fingerprints
from fedtune.evidence.coordinator_home import home_beside
from fedtune.evidence.figures import (
    MALFORMED,
    TODO,
    check_release,
    count_absent,
    fail,
    headline,
    privacy,
    rounds,
    seals,
    signed_json,
)
from fedtune.evidence.personal import refuse_personal
from fedtune.evidence.sign import (
    EVIDENCE,
    FORMAT,
    PURPOSE,
    RUN,
    UNSIGNED,
    VERSIONS,
    list_covered,
    sha256,
)
from fedtune.evidence.versions import check_versions
from fedtune.report.run_files import read_report

DOSSIER = ("release.json", "dossier.json", "dossier.html", "dossier.md", "dossier.pdf")
LARGE = 1 << 28  # bytes of evidence.json


@dataclass(frozen=True)
class Verified:
    """The result of verifying a run's folder.

    - signer: the fingerprint of the key and CA that signed, which a consortium's coordinator reads
      out
    - trusted: whether `signer` is a consortium's and equals the fingerprint that the caller gave;
      this proves something only if the caller did not take that fingerprint from this folder
    - simulated: whether the signature names no consortium's CA, so that no institution vouches for
      the run
    - sites: each site's fingerprint ("" if it never enrolled), steps and ε
    - epsilon: the largest ε of a site's updates, without its answers to queries; None without
      privacy
    - with_queries: the largest ε of a site's updates and answers together, which holds for a
      patient who is also among the held-out records; None if no query was made
    - fallback, assumption: with secure aggregation, the largest ε by a site's own noise alone, and
      the assumption under which `epsilon` holds
    - not_signed: files in the folder that the signature does not cover
    - declared: sites whose data the report calls public or generated
    - free_query: sites at which, by the report, a query or a view selects the records, which ε does
      not cover
    - exported: whether the run was found inside an exported model, whose weights nobody signed
    - capped: whether ε is the plan's bound for one patient, at which the sites leave a patient out,
      and not the ε of all steps together
    - released: "trained" or "start" (the public start) if the plan lets the better of both be
      released; after "start", trained/ holds the trained model
    - verdicts: for a study without a last round, verdict -> number of versions, computed again from
      their comparisons
    - absent: site -> the number of the plan's rounds and queries of which the evidence has no
      update or answer of the site, because it was away or somebody left them out, and the ε that it
      would have with all of them
    - dossier: for a dossier, when it was made, its files, and who approved it"""

    study: str
    plan: str
    private: bool
    signer: str
    trusted: bool
    simulated: bool
    epsilon: float | None = None
    with_queries: float | None = None
    fallback: float | None = None
    assumption: str = ""
    delta: float | None = None
    unit: str = ""
    updates: int = 0
    files: int = 0
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_signed: tuple[str, ...] = ()
    declared: dict[str, str] = field(default_factory=dict)
    free_query: tuple[str, ...] = ()
    exported: bool = False
    capped: bool = False
    released: str = ""
    verdicts: dict[str, int] = field(default_factory=dict)
    absent: dict[str, dict[str, Any]] = field(default_factory=dict)
    dossier: dict[str, Any] = field(default_factory=dict)


def verify(run: Path | str, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a run, the run inside an exported model, or a dossier. Every signature and every
    digest is checked, and ε is computed from the step logs; in a dossier, each figure and every
    approval is checked too.

    - run: the folder of the run, the exported model or the dossier
    - trust: the consortium's fingerprint, which its coordinator reads out; "": any signer is
      accepted, and `signer` of the result names the one found
    - sites: site -> the fingerprint that it read out; None, and a site that is not named: its keys
      are not compared

    >>> import fedtune
    >>> fedtune.verify_run("runs/none")
    Traceback (most recent call last):
      ...
    fedtune.core.errors.NotGenuine: ...

    Errors: NotGenuine (no signed folder, or a file, a signature or a figure that does not fit),
    Refused (the signer is not `trust`, or a site's keys do not fit `sites`), InputError (no plan),
    ConfigError (a malformed plan)."""
    if any(os.path.lexists(Path(run) / name) for name in DOSSIER):
        from fedtune.evidence.dossier.check import check

        return check(Path(run), trust, sites)
    return verify_run(Path(run), trust, sites)


def verify_run(run: Path, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a run, or the run inside an exported model, but no dossier. Parameters, result and
    errors are as for `verify`."""
    run, signed, exported = _open_run(run)
    name = fingerprints.of_consortium(signed["ca"], signed["coordinator"])
    if trust and not fingerprints.match_fingerprints(trust, name):
        raise Refused(
            f"{run}: was signed by {name}",
            trust,
            "ask the coordinator for its consortium's fingerprint; do not use this folder",
        )
    _files(run, signed["files"], signed["sizes"])
    study, report = load_plan(run), _report(run)
    _link(run, report)
    content = signed_json(run / EVIDENCE, FORMAT, LARGE)[0]
    try:
        events = seals(run, content, study, signed["coordinator"], bool(signed["ca"]))
        updates = rounds(run, content, study, report)
        claim = privacy(run, study, report, content["sites"], events)
        lacking = count_absent(content, study, events)
        chosen = check_release(run, study, report, signed["files"])
        verdicts = check_versions(run, study, report, signed["files"])
        headline(run, report)
    except MALFORMED:
        fail(run, "its report or its evidence is not what a coordinator writes")
    found = Verified(
        study=study.study.name,
        plan=study.digest,
        private=study.private,
        signer=name,
        trusted=bool(trust and signed["ca"]),
        simulated=not signed["ca"],
        updates=updates,
        files=len(signed["files"]),
        not_signed=_not_signed(exported or run, run),
        declared=report.get("declared") or {},
        free_query=tuple(report.get("free_query") or ()),
        exported=exported is not None,
        released=chosen,
        verdicts=verdicts,
        absent=lacking,
        **claim,
    )
    _same_sites(run, found, sites or {})
    return found


def _open_run(path: Path) -> tuple[Path, dict[str, Any], Path | None]:
    """Find the run in `path`: `path` itself, or a folder in it if it is an exported model. Return
    the run's folder, its signature, and the model's folder (None for a run)."""
    inner = path / RUN
    names = ("plan.json", ADAPTER, SIGNATURE, EVIDENCE)
    exported = inner.is_dir() and not any(os.path.lexists(path / name) for name in names)
    if exported and inner.is_symlink():
        fail(inner, "is a link", "the run's own files")
    run = inner if exported else path
    return run, _signature(run), path if exported else None


def _report(run: Path) -> dict[str, Any]:
    """Read and return report.json. It must have the canonical form, since a key could otherwise
    occur twice, and readers would differ about its value. Errors: NotGenuine."""
    report = read_report(run)
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if reading.text(run / "report.json", "the report of a run", TODO, NotGenuine) != text:
        fail(run / "report.json", "is not spelled as a coordinator writes it")
    return report


def _link(run: Path, report: dict[str, Any]) -> None:
    """Check that the link adapter/ of a continuous study leads to the version that the report
    states to be in use."""
    link, table = run / ADAPTER, report.get("continuous")
    if link.is_symlink() or table is not None:
        number = table.get("version in use") if isinstance(table, dict) else None
        if not link.is_symlink() or os.readlink(link) != f"{VERSIONS}/{number}":
            fail(link, "is not the version that the report is of", f"{VERSIONS}/{number}")


def key_of(run: Path) -> tuple[SigningKey, str] | None:
    """Return the coordinator's key that signed a run, which is read from the home beside the folder
    of runs, and the CA's certificate (PEM) in the signature. Return None if there is no such home,
    the home's key is another one, or the run does not verify.

    To change a signed run and sign it again, call this before the change, so that only a run that
    verified is signed again. Errors: InfrastructureError (the key cannot be read)."""
    path = home_beside(run) / "signing.key"
    if not path.exists():
        return None
    try:
        verify(run)
        signed = _signature(run)
    except FedtuneError:
        return None
    key = SigningKey.at(path)
    return (key, signed["ca"]) if key.public == signed["coordinator"] else None


def certificate_of(run: Path) -> tuple[str, str]:
    """Verify only the signature in signature.json, not the files. Return the public key that signed
    (hexadecimal) and the certificate of the CA that signature.json names (PEM; "" in a simulation).
    Errors: NotGenuine."""
    signed = _signature(run)
    return signed["coordinator"], signed["ca"]


def signer(run: Path) -> str:
    """Return the fingerprint of the signer that signature.json names, without verifying it; "" if
    the run is not signed."""
    try:
        content = signed_json(run / SIGNATURE, FORMAT)[0]
        return fingerprints.of_consortium(str(content["ca"]), str(content["coordinator"]))
    except (NotGenuine, KeyError):
        return ""


def check_signed(run: Path) -> None:
    """Verify a run or a dossier that has a signature; accept a run or a dossier without one.

    Errors: NotGenuine; NeverLeaves (a site's personal model)."""
    refuse_personal(run)
    if is_signed(run) or (run / DOSSIER[0]).exists():
        verify(run)


def is_signed(run: Path) -> bool:
    """Return whether the folder has a signature or evidence, which may be invalid."""
    return (run / SIGNATURE).exists() or (run / EVIDENCE).exists()


def _signature(run: Path) -> dict[str, Any]:
    path = run / SIGNATURE
    if not run.is_dir():
        fail(run, "no such folder", "a run's folder")
    if not path.exists():
        raise NotGenuine(
            f"{run}: is not signed",
            f"{SIGNATURE}, which a coordinator writes when a run ends",
            "a model made from other runs is verified by those runs; an unfinished "
            "run is continued with --resume",
        )
    content, _ = signed_json(path, FORMAT)
    kinds = dict.fromkeys(("format", "ca", "coordinator", "signature"), "str")
    kinds |= dict.fromkeys(("files", "sizes"), "dict")
    if {name: type(value).__name__ for name, value in content.items()} != kinds:
        fail(path, "is not what a coordinator signs")
    signature = content.pop("signature")
    if not verifies(content["coordinator"], PURPOSE + canonical(content), signature):
        fail(path, "its signature does not fit", "the signature of the key that it names")
    return content


def _files(run: Path, files: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Check that the signed files are present and unchanged, and that the folder has no other file
    which a signature would have to cover.

    files, sizes: file -> sha256, and size in bytes. Errors: NotGenuine."""
    present = list_covered(run)
    for name in present:
        if name not in files:
            fail(run / name, "was added after the signature", "the files that were signed")
    for name, digest in files.items():
        if name not in present:
            fail(run / name, "is missing", "every file that was signed")
        path = run / name  # the size is checked before hashing, since a file may be endless
        if path.is_symlink() or path.stat().st_size != sizes.get(name) or _sha256(path) != digest:
            fail(run / name, "was changed after it was signed", f"sha256 {str(digest)[:16]}…")
    if not any(name.startswith((f"{ADAPTER}/", f"{VERSIONS}/")) for name in files):
        fail(run / ADAPTER, "is not signed", "an adapter")


def _sha256(path: Path) -> str:
    reading.regular(path, "a file as it was signed", TODO, NotGenuine)  # refuses pipes and folders
    return sha256(path)


def _not_signed(folder: Path, run: Path) -> tuple[str, ...]:
    """List the names in a folder that the run's signature does not cover. folder: the run's own
    folder, or that of a model exported from the run, of which only the run inside is covered."""
    known = {name.partition("/")[0] for name in list_covered(run)} | {SIGNATURE, ADAPTER}
    known = {RUN} if folder != run else known
    rest = sorted(path.name for path in folder.iterdir() if path.name not in known)
    return (*rest, *sorted(name for name in UNSIGNED if folder == run and (run / name).exists()))


def _same_sites(run: Path, found: Verified, sites: Mapping[str, str]) -> None:
    for name, fingerprint in sites.items():
        signed = found.sites.get(name, {}).get("fingerprint", "")
        if not signed or not fingerprints.match_fingerprints(signed, fingerprint):
            raise Refused(
                f"{run}: {name!r} signed with keys of fingerprint {signed or 'unknown'}",
                fingerprint,
                "ask the site for the fingerprint that `fedtune enroll` showed",
            )
