"""Package a finished run as a signed dossier (`fedtune release`), and approve a dossier (`fedtune
approve`)."""

from __future__ import annotations

import json
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError, InputError, Refused
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.run_folder import ADAPTER, load_plan
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence.coordinator_home import home_beside
from fedtune.evidence.dossier import openssf, pictures
from fedtune.evidence.dossier.assurance import crate, pack
from fedtune.evidence.dossier.assurance import sections as assurance
from fedtune.evidence.dossier.assurance.registry import FILE as REGISTRY
from fedtune.evidence.dossier.assurance.registry import registry
from fedtune.evidence.dossier.card import card
from fedtune.evidence.dossier.content import blanks, build, dump_content
from fedtune.evidence.dossier.facts import documents
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.dossier.page import page
from fedtune.evidence.dossier.pdf import can_write, pdf
from fedtune.evidence.dossier.sbom import bill_of_materials
from fedtune.evidence.dossier.seal import (
    APPROVALS,
    AUDIT,
    CONTENT,
    LONGEST,
    PDF,
    RELEASE,
    approval,
    file_name,
    format_now,
    list_covered,
    read_release,
    sign,
)
from fedtune.evidence.personal import refuse_personal
from fedtune.evidence.sign import RUN, carry
from fedtune.evidence.told import FOLDER as TOLD
from fedtune.evidence.told import read_told
from fedtune.evidence.verify import Verified, certificate_of, is_signed, verify, verify_run
from fedtune.report.run_files import new_folder, read_report
from fedtune.report.start_file import read_start, write_start

DETAILS = "a TOML file: one line for each blank, as `--details` writes it where there is none"


def release(
    run: Path | str,
    out: Path | str,
    *,
    details: Mapping[str, str] | None = None,
    home: Path | None = None,
    sections: Path | str | None = None,
    attacks: Sequence[Path | str] = (),
) -> Verified:
    """Write a signed dossier of a finished run into a new folder. Return a Verified, the result of
    verifying this dossier.

    Args:
        run: the run's folder.
        out: the dossier's folder, which must not exist.
        details: a blank's key -> the text that a person typed into it; other blanks stay blank.
        home: the coordinator's home, whose key signs; by default the home beside the folder of
            runs. A simulation has no home: its dossier is signed with a new key, which is not
            stored.
        sections: a folder with further sections of the assurance pack, such as a hospital's rules;
            None: the pack has only the sections that come with fedtune.
        attacks: folders that `fedtune attack RUN` or `fedtune audit` wrote; the pack states their
            results.

    >>> import fedtune
    >>> fedtune.release("runs/none", "dossiers/none")
    Traceback (most recent call last):
      ...
    fedtune.core.errors.NotGenuine: ...

    Guarantee: either `out` is complete, or it is not made. It verifies, and every figure in it is
    the run's.

    Errors: NotGenuine if the run is not signed, or was changed after it was signed; ConfigError if
    `out` exists, if the run was derived from others, if `run` is an exported model, if a file is no
    section, or if an attack is not of this run; Refused if `home` lacks the key that signed the
    run, if the run is a site's personal model, or if an attack was made at a site;
    InfrastructureError."""
    run, out = Path(run), Path(out)
    refuse_personal(run)
    _refuse_derived(run)
    proven = verify_run(run)
    if proven.exported:
        raise ConfigError(
            f"{run}: is an exported model",
            "a run folder",
            "release the run from which it was exported",
        )
    home = home or home_beside(run)
    key, ca = _key(run, home, proven)
    told = assurance.all_sections(Path(sections) if sections else None)
    made = format_now()
    if not proven.simulated:
        AuditLog(home, key).add("release", run=run.absolute(), dossier=out)
    with new_folder(out) as draft:
        carry(run, draft)
        _carry_told(run, draft / RUN)
        if (start := read_start(run, load_plan(run))) is not None:
            write_start(start, draft / RUN)
        found = dict(documents(draft / RUN)) | {"simulated": proven.simulated}
        if (run / AUDIT).is_file():
            shutil.copyfile(run / AUDIT, draft / AUDIT)
            found[AUDIT] = True
        for folder in attacks:
            found |= _carry_attacks(Path(folder), draft, found["report.json"])
        _write(draft, found, details or {})
        if openssf.can_sign():
            _sign_weights(draft, None if proven.simulated else home)
        if sections:
            _carry_sections(Path(sections), draft)
        _write_pack(draft, found, details or {}, told, made)
        sign(draft, key, ca, made)
        verify(draft)
    return verify(out)


def _carry_told(run: Path, into: Path) -> None:
    """Copy the sites' statements about the run's model from the run's folder to the dossier `into`.
    A statement that does not count for this model is left out."""
    for one in read_told(run):
        if not one.problem:
            (into / TOLD).mkdir(exist_ok=True)
            shutil.copyfile(run / TOLD / one.file, into / TOLD / one.file)


def _carry_attacks(folder: Path, into: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the results of attacks into a dossier. Return a dict from each result's file name to its
    content.

    - folder: the folder that `fedtune attack RUN` or `fedtune audit` wrote
    - into: the dossier's folder
    - report: the content of the run's report.json, to whose plan the results must belong

    Errors: ConfigError if `folder` has no result, or one of another study or plan; Refused if a
    result is from an attack at a site, on the site's own records."""
    found = {
        name: reading.json_in(folder / name, "what an attack found")
        for name in assurance.ATTACKS
        if (folder / name).is_file()
    }
    if not found:
        raise ConfigError(
            f"{folder}: has no {' or '.join(assurance.ATTACKS)}", "an attack's folder"
        )
    for name, content in found.items():
        if "private" not in content and "one_step" not in content:
            raise Refused(
                f"{folder / name}: is not of generated records",
                "a file that `fedtune attack RUN` or `fedtune audit` wrote",
                "leave this file out: what a site's own attack found depends on its records, "
                "and stays at the site",
            )
        if content.get("study") != report["study"]:
            raise ConfigError(f"{folder / name}: is of another study", str(report["study"]))
        if content.get("plan_digest") != report["plan_digest"]:
            raise ConfigError(
                f"{folder / name}: is of another plan, or was written before results named theirs",
                str(report["plan_digest"]),
                "run `fedtune attack RUN`, or `fedtune audit STUDY --run RUN`, again",
            )
        shutil.copyfile(folder / name, into / name)
    return found


def _carry_sections(folder: Path, into: Path) -> None:
    (into / assurance.FOLDER).mkdir()
    for path in folder.glob("*.toml"):
        shutil.copyfile(path, into / assurance.FOLDER / path.name)


def _refuse_derived(run: Path) -> None:
    """Refuse a run that was made from other runs, for example by merging them. Errors: ConfigError,
    which names those runs."""
    if is_signed(run) or not (run / "report.json").is_file():
        return
    report = read_report(run)
    made = report.get("merge") or report.get("derived") or {}
    parents = made.get("parents") or []
    names = [str(parent.get("study") or parent.get("name")) for parent in parents]
    if names:
        raise ConfigError(
            f"{run}: was made of other runs ({', '.join(names)}), and no site signed it",
            "a run whose updates its sites signed",
            "release each of those runs; what they cost each site together is in "
            f"{run / 'report.md'}, which goes with their dossiers",
        )


def _key(run: Path, home: Path, proven: Verified) -> tuple[SigningKey, str]:
    """Return two things: the key that signs the dossier, and the certificate of the consortium's CA
    (PEM). For a simulation these are a new key, and "".

    - run: the run's folder
    - home: the coordinator's home, whose key must be the one that signed the run
    - proven: the result of verifying the run

    Errors: Refused if the home does not have the key that signed the run."""
    if proven.simulated:
        return SigningKey(), ""
    path = home / "signing.key"
    signer, ca = certificate_of(run)
    key = SigningKey.at(path) if path.exists() else None
    if key is None or key.public != signer:
        raise Refused(
            f"{run}: was signed by {proven.signer}, whose key is not in {path.parent}",
            "the coordinator's home",
            "release the run where its coordinator is, or name that folder with --home",
        )
    return key, ca


def _sign_weights(draft: Path, home: Path | None) -> None:
    """Sign the weights in a dossier also in OpenSSF's format. draft: the dossier's folder, which is
    not complete yet. home: the coordinator's home, whose key for this format signs; None for a
    simulation, which is signed with a new key that is not stored."""
    with tempfile.TemporaryDirectory() as nowhere:
        key = (home or Path(nowhere)) / openssf.KEY
        openssf.sign_weights(draft / RUN / ADAPTER, draft, key)


def _write(draft: Path, found: Mapping[str, Any], details: Mapping[str, str]) -> None:
    content = build(found, details)
    replace(draft / CONTENT, dump_content(content).encode())
    replace(draft / "dossier.md", markdown(content).encode())
    replace(draft / "dossier.html", page(content).encode())
    (draft / pictures.FOLDER).mkdir(exist_ok=True)
    for name, picture in pictures.files(content).items():
        replace(draft / name, picture.encode())
    if can_write():
        replace(draft / PDF, pdf(content))
    replace(draft / "README.md", card(content, found, draft / RUN).encode())
    bill = json.dumps(bill_of_materials(found["report.json"]), indent=1, ensure_ascii=False)
    replace(draft / "sbom.cdx.json", (bill + "\n").encode())


def _write_pack(
    draft: Path,
    found: Mapping[str, Any],
    typed: Mapping[str, str],
    sections: Sequence[assurance.Section],
    made: str,
) -> None:
    """Write the assurance pack into a dossier. All other files of the dossier, except its
    signature, must be there already.

    - draft: the dossier's folder, which is not complete yet
    - found: the documents of the run and of attacks on it, by file name
    - typed: a blank's key -> the text that a person typed into it
    - sections: the statements to answer: fedtune's, and a hospital's if it has its own
    - made: when the dossier is signed, UTC, as `format_now` writes it"""
    entry = {REGISTRY: registry(found, typed, made)} if found["report.json"]["private"] else {}
    names = {*list_covered(draft), *entry, pack.JSON, pack.PAGE, crate.FILE, RELEASE}
    content = pack.build_pack(found, typed, sections, names)
    written = {
        pack.JSON: pack.dump(content),
        pack.PAGE: pack.pack_page(content),
        **entry,
        crate.FILE: crate.crate(found, typed, names - {RELEASE}, made),
    }
    for name, text in written.items():
        replace(draft / name, text.encode())


def read_details(path: Path, sections: Sequence[assurance.Section] | None = None) -> dict[str, str]:
    """Read the file in which a person typed texts for a dossier's blanks. Return a dict from a
    blank's key to the text.

    - path: the TOML file
    - sections: the assurance pack's sections; None for those that come with fedtune

    Errors: InputError if the file cannot be read; ConfigError if a key is unknown, or a value is
    not a text."""
    known = {block["blank"] for block in blanks()} | {key for key, _ in _pack_blanks(sections)}
    table = reading.toml_in(path, DETAILS)
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}", ", ".join(sorted(known)))
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {key} is not a text", 'a text, as in contact = "…"')
    return table


def _pack_blanks(
    sections: Sequence[assurance.Section] | None,
) -> list[tuple[str, tuple[str, ...]]]:
    """Return a pair for each blank of the assurance pack: its key, and the lines that explain it to
    a person. sections: the pack's sections; None for those that come with fedtune."""
    if sections is None:
        sections = assurance.package_sections()
    return [
        (
            assurance.key(section, row),
            (f"{section['title']}, {row['id']}: {row['asks']}", row["organisation"]),
        )
        for section, row in assurance.blanks(sections)
    ]


def details_template(sections: Sequence[assurance.Section] | None = None) -> str:
    """Return the text of a TOML file in which a person can fill in a dossier's blanks. sections:
    the assurance pack's sections; None for those that come with fedtune.

    >>> "contact = " in details_template()
    True
    """
    lines = [
        "# What only people can say, for the dossier of a run: fedtune release RUN --details FILE.",
        "# It goes into the signed dossier as it stands here. A line left empty stays a blank.",
    ]
    for block in blanks():
        lines += ["", f"# {block['label']}", f"# {block['help']}", f'{block["blank"]} = ""']
    for key, told in _pack_blanks(sections):
        lines += ["", *(f"# {' '.join(line.split())}" for line in told), f'{json.dumps(key)} = ""']
    text = "\n".join(lines) + "\n"
    tomllib.loads(text)
    return text


def approve(
    folder: Path | str,
    key: Path | str | SigningKey,
    trust: str,
    *,
    name: str,
    role: str,
    reason: str,
    log: AuditLog | None = None,
) -> Verified:
    """Approve a dossier as a named person, or for a site with the site's key. Return a Verified,
    the result of verifying the dossier with the approval in it.

    - folder: the dossier's folder; the approval is written into approvals/ in it
    - key: the approver's signing key, or the path of its file; if the file does not exist, it is
      made with a new key, readable by this user only
    - trust: the consortium's fingerprint, so that nobody approves a stranger's folder; "" accepts
      any signer
    - name, role: who approves, and in which role
    - reason: why the person approves. Name, role and reason have at most LONGEST characters each,
      on one line
    - log: a site's audit log, in which the approval is entered first; None for a person's own key

    >>> import fedtune
    >>> who = {"name": "Ada Lund", "role": "data protection officer", "reason": "read"}
    >>> fedtune.approve("dossiers/none", "ada.key", "0123 4567 89ab cdef 0123", **who)
    Traceback (most recent call last):
      ...
    fedtune.core.errors.NotGenuine: ...

    Errors: NotGenuine if the dossier does not verify; Refused if the signer does not have the
    fingerprint `trust`; InputError if the folder is no dossier, or this key approved it already;
    ConfigError if name, role or reason is empty, too long or not on one line."""
    folder = Path(folder)
    for what, said in (("name", name), ("role", role), ("reason", reason)):
        if not said.strip() or len(said) > LONGEST or not said.isprintable():
            raise ConfigError(
                f"--{what}: is empty, longer than {LONGEST} characters, or not on one line",
                "a text on one line",
            )
    if not verify(folder, trust).dossier:
        raise InputError(f"{folder}: is not a dossier", "a folder that `fedtune release` wrote")
    _, digest = read_release(folder)
    key = key if isinstance(key, SigningKey) else SigningKey.at(Path(key))
    path = folder / APPROVALS / file_name(key.public)
    if path.exists():
        raise InputError(f"{path}: this key approved this release already", "one approval per key")
    if log:
        log.add("approve", release=digest)
    replace(path, canonical(approval(digest, key, name, role, reason)))
    return verify(folder, trust)
