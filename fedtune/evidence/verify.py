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
    check_release,
    count_absent,
    headline,
    privacy,
    rounds,
    seals,
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
from fedtune.evidence.signed_files import MALFORMED, TODO, fail, signed_json
from fedtune.evidence.versions import check_versions
from fedtune.report.run_files import read_report
from fedtune.report.teacher import teacher_left_out_line

DOSSIER = ("release.json", "dossier.json", "dossier.html", "dossier.md", "dossier.pdf")
LARGE = 1 << 28  # bytes of evidence.json


@dataclass(frozen=True)
class Verified:
    """The result of verifying a run's folder.

    - study, plan: the study's name, and the digest of its plan
    - private: whether the study trained with differential privacy
    - signer: the fingerprint of the key and CA that signed, which a consortium's coordinator reads
      out
    - trusted: whether `signer` is a consortium's and equals the fingerprint that the caller gave;
      this proves something only if the caller did not take that fingerprint from this folder
    - simulated: whether the signature names no consortium's CA, so that no institution vouches for
      the run
    - sites: site -> a dict of its fingerprint ("" if it never enrolled) and signing key and, in a
      private study, its number of steps and its ε
    - epsilon: the largest ε of a site's updates, without its answers to queries; None without
      privacy
    - with_queries: the largest ε of a site's updates and answers together, which holds for a
      patient who is also among the held-out records; None if no query was made
    - with_teacher: the ε of this run and of its teacher's training together, as the report states
      it; it is checked only to be at least `epsilon`. None if the report states no such sum
    - delta, unit: δ and the unit of privacy ("patient" or "record") for which ε holds; None and ""
      without privacy
    - updates, files: how many updates of sites the evidence holds, and how many files are signed
    - fallback, assumption: with secure aggregation, the largest ε by a site's own noise alone, and
      the assumption under which `epsilon` holds
    - not_signed: files in the folder that the signature does not cover
    - declared: site -> what kind of data the report says it has, of the sites whose data it calls
      public or generated
    - free_query: sites at which, by the report, a query or a view of a database selects the
      records; ε does not cover this selection
    - left_out: the sentence which says that `epsilon` does not hold the cost of the run's teacher,
      and why, by the report; "" if the run has no such teacher
    - made_by: the release of fedtune that the report names. If it is not this release, the
      sentences about quality were not compared with the report's figures
    - exported: whether the run was found inside an exported model, whose weights nobody signed
    - capped: whether `epsilon` is the plan's bound for one patient instead of the ε of all steps
      together; the sites leave out a patient who has reached this bound
    - released: which model is released, if the plan leaves a choice: "trained", or "start" for the
      public start (then trained/ holds the trained model); "" if the plan leaves no choice
    - verdicts: for a study without a last round, verdict -> how many versions have it; each verdict
      was computed again from the version's comparison, if that is stored
    - absent: site -> what the evidence lacks of this site, since the site was away or somebody left
      it out: a dict of the number of rounds without an update, of the number of queries without an
      answer, and of the ε that the site would have spent with one more answer to each
    - dossier: for a dossier, a dict that says when it was made, which files it has, and who
      approved it"""

    study: str
    plan: str
    private: bool
    signer: str
    trusted: bool
    simulated: bool
    epsilon: float | None = None
    with_queries: float | None = None
    with_teacher: float | None = None
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
    left_out: str = ""
    made_by: str = ""
    exported: bool = False
    capped: bool = False
    released: str = ""
    verdicts: dict[str, int] = field(default_factory=dict)
    absent: dict[str, dict[str, Any]] = field(default_factory=dict)
    dossier: dict[str, Any] = field(default_factory=dict)


def verify(run: Path | str, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a run, the run inside an exported model, or a dossier, and return what was found.
    Every signature and every digest is checked, and ε is computed from the step logs. In a dossier,
    each figure and every approval is checked too.

    - run: the folder of the run, the exported model or the dossier
    - trust: the consortium's fingerprint, which its coordinator reads out; "": any signer is
      accepted, and `signer` of the result names it
    - sites: site -> the fingerprint that it read out. The keys of a site that is not named are not
      compared; None: no keys are

    >>> import fedtune
    >>> fedtune.verify_run("runs/none")
    Traceback (most recent call last):
      ...
    fedtune.core.errors.NotGenuine: ...

    Errors: NotGenuine if the folder is not signed, or a file, a signature or a figure does not fit;
    Refused if the signer does not have the fingerprint `trust`, or a site's keys do not fit
    `sites`; InputError if there is no plan; ConfigError if the plan is malformed."""
    if any(os.path.lexists(Path(run) / name) for name in DOSSIER):
        from fedtune.evidence.dossier.check import check

        return check(Path(run), trust, sites)
    return verify_run(Path(run), trust, sites)


def verify_run(run: Path, trust: str = "", sites: Mapping[str, str] | None = None) -> Verified:
    """Verify a run, or the run inside an exported model, and return what was found. Unlike
    `verify`, this function accepts no dossier. It raises the same errors as `verify`.

    - run: the folder of the run or of the exported model
    - trust: the consortium's fingerprint, which its coordinator reads out; "": any signer is
      accepted
    - sites: site -> the fingerprint that it read out. The keys of a site that is not named are not
      compared; None: no keys are"""
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
        left_out = teacher_left_out_line(report)
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
        left_out=left_out,
        made_by=str(report.get("fedtune"))[:64],
        exported=exported is not None,
        released=chosen,
        verdicts=verdicts,
        absent=lacking,
        **claim,
    )
    _same_sites(run, found, sites or {})
    return found


def _open_run(path: Path) -> tuple[Path, dict[str, Any], Path | None]:
    """Find the run in `path`, which is either a run's folder or an exported model with a run's
    folder in it. Return three things: the run's folder, the content of its signature, and the
    model's folder (None for a run)."""
    inner = path / RUN
    names = ("plan.json", ADAPTER, SIGNATURE, EVIDENCE)
    exported = inner.is_dir() and not any(os.path.lexists(path / name) for name in names)
    if exported and inner.is_symlink():
        fail(inner, "is a link", "the run's own files")
    run = inner if exported else path
    return run, _signature(run), path if exported else None


def _report(run: Path) -> dict[str, Any]:
    """Read a run's report.json and return its content. The file must be written in the canonical
    form: otherwise a key could occur twice, and readers could differ about its value. Errors:
    NotGenuine."""
    report = read_report(run)
    text = json.dumps(report, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    if reading.text(run / "report.json", "the report of a run", TODO, NotGenuine) != text:
        fail(run / "report.json", "is not spelled as a coordinator writes it")
    return report


def _link(run: Path, report: dict[str, Any]) -> None:
    """Check that, in a continuous study, the link adapter/ leads to the version that the report
    states to be in use. In any other study adapter/ must not be a link. run: the run's folder;
    report: the content of report.json. Errors: NotGenuine."""
    link, table = run / ADAPTER, report.get("continuous")
    if link.is_symlink() or table is not None:
        number = table.get("version in use") if isinstance(table, dict) else None
        if not link.is_symlink() or os.readlink(link) != f"{VERSIONS}/{number}":
            fail(link, "does not lead to the version in use", f"{VERSIONS}/{number}")


def key_of(run: Path) -> tuple[SigningKey, str] | None:
    """Verify a run, and return what is needed to sign it again after a change: the coordinator's
    key that signed it, and the certificate of the consortium's CA (PEM) in its signature. Return
    None if there is no coordinator's home beside the folder of runs, if that home has another key,
    or if the run does not verify.

    Call this before the change, so that only a run that verified is signed again. Errors:
    InfrastructureError if the key cannot be read."""
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
    """Verify only the signature in signature.json, not the files that it covers. Return two things:
    the public key that signed, in hexadecimal, and the certificate of the CA that signature.json
    names (PEM; "" in a simulation). Errors: NotGenuine."""
    signed = _signature(run)
    return signed["coordinator"], signed["ca"]


def signer(run: Path) -> str:
    """Return the fingerprint of the signer whom signature.json names. The signature is not
    verified. Return "" if the run is not signed."""
    try:
        content = signed_json(run / SIGNATURE, FORMAT)[0]
        return fingerprints.of_consortium(str(content["ca"]), str(content["coordinator"]))
    except (NotGenuine, KeyError):
        return ""


def check_signed(run: Path) -> None:
    """Verify a run or a dossier if it has a signature; accept one without a signature as it is.

    Errors: NotGenuine; NeverLeaves if it is a site's personal model."""
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
            "if the model was made from other runs, verify these runs; if the run is unfinished, "
            "continue it with --resume",
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
    """Check that the files that a run's signature covers are present and unchanged, and that the
    folder has no further file that a signature would have to cover.

    - run: the run's folder
    - files: path of each signed file in the folder -> its sha256
    - sizes: path of each signed file in the folder -> its size in bytes

    Errors: NotGenuine."""
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
    """List the names of the files and folders that lie in `folder` and are not covered by the run's
    signature. folder: the run's own folder, or the folder of a model exported from the run; in the
    latter only the run inside is covered."""
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
