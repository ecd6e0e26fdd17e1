"""Read, check and store the coordinator's answer to a site, which makes the site a member of the
consortium.

    read(file, ...)         reads an answer; checks that it is complete and for this site
    join(file, ...)         does the same, compares the fingerprint that a person heard by phone,
                            and stores the answer beside the site's keys
    load_answer(keys, ...)  reads the stored answer, with which a client connects

An answer comes by mail. Its address and its plan for review are not trusted until a person has
compared the consortium's fingerprint with the one that the coordinator read out.

| an answer is refused if                                                         | by          |
| it is larger than MAX_BYTES, not JSON, has other fields, or a value is no text  | ConfigError |
| it is for another site or other keys, or its CA did not sign its certificate    | ConfigError |
| its plan is not a plan, or its coordinator did not sign the plan                | ConfigError |
| no fingerprint is given, and none was stored                                    | ConfigError |
| its fingerprint is another than the given one                                   | Refused     |

Guarantee: the fingerprint comes from a person, never from the answer. An answer is stored only if
its fingerprint agrees with the person's. The answer is stored beside the keys for which it was
made, so new keys need a new answer.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedtune.core.config import Site, Study, study_from_json
from fedtune.core.config.address import host_and_port
from fedtune.core.errors import ConfigError, FedtuneError, Refused
from fedtune.core.files import writing
from fedtune.core.wire.seal import check_plan
from fedtune.evidence import fingerprints
from fedtune.flower import certs, enrol
from fedtune.flower.enrol import EC, Answer

MAX_BYTES = 2**20  # largest size of an answer
KEPT = "answer.json"  # the stored answer, in the folder of the site's keys
_REQUIRED = {"name", "address", "ca", "certificate", "coordinator"}
_OPTIONAL = {"plan", "signature"}
AGAIN = "ask the coordinator for it again"


def keys_folder(site: Site) -> Path:
    """Return the folder of a site's network keys, which is in the site's state folder."""
    return site.site.state / "keys"


def read(path: Path, tls: EC, name: str, expected: str = "") -> Answer:
    """Read the coordinator's answer to a site, and check that it is complete and for this site. The
    plan for review in the answer is not checked here, but by `plan_of`.

    - path: the file of the answer
    - tls: the site's public TLS key, which the answer's certificate must have
    - name: the site's name, which the answer must have
    - expected: the consortium's fingerprint as the coordinator read it out; "": it is not compared

    Errors: ConfigError if the file is no such answer, if the CA in it did not sign the certificate
    in it, or if it is for another name or key; Refused if its fingerprint is not `expected`."""
    fields = enrol.texts_in(path, MAX_BYTES)
    if not _REQUIRED <= set(fields) <= _REQUIRED | _OPTIONAL:
        raise ConfigError(f"{path}: not an answer", "the file that `fedtune admit` wrote")
    received = Answer(**fields)
    try:
        leaf = x509.load_pem_x509_certificate(received.certificate.encode())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(received.ca.encode()))
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(f"{path}: its certificate was not signed by its CA", todo=AGAIN) from None
    if received.name != name or leaf.public_key() != tls:
        raise ConfigError(
            f"{path}: the answer to another request",
            f"one for the site {name} and its present keys",
            "`fedtune enroll` writes a new request; have it admitted",
        )
    try:
        host_and_port(received.address)
    except ValueError as error:
        raise ConfigError(f"{path}: its address {error}", todo=AGAIN) from None
    if expected and not fingerprints.match_fingerprints(expected, received.fingerprint):
        raise Refused(
            f"{path}: the consortium's fingerprint is {received.fingerprint}",
            f"{expected[:40]}, as it was read out",
            "call the coordinator; somebody may have replaced the file",
        )
    return received


def plan_of(answer: Answer, path: Path) -> Study | None:
    """Return the study's plan that an answer brings for review, after checking it; None if there is
    none. path: the answer's file, for the errors' texts.

    Errors: ConfigError if the text is not a plan, or the answer's coordinator did not sign it."""
    if not answer.plan:
        return None
    try:
        study = study_from_json(answer.plan)
        check_plan({"coordinator": answer.coordinator, "signature": answer.signature}, study.digest)
    except FedtuneError as error:
        raise ConfigError(
            f"{path}: its plan cannot be read: {error.happened}", todo=AGAIN
        ) from None
    return study


def read_reviewed_plan(answer: Answer) -> str:
    """Return the digest of the study's plan that an answer brings for review; "" if it brings none,
    if this release cannot read the plan, or if its signature is not valid."""
    try:
        study = plan_of(answer, Path(KEPT))
    except ConfigError:
        return ""
    return study.digest if study else ""


def join(path: Path, keys: Path, name: str, fingerprint: str | None) -> Answer:
    """Join the consortium: check the coordinator's answer against the fingerprint that a person
    heard, store the answer, and return it.

    - path: the file of the answer
    - keys: the folder of the site's network keys, in which the answer is stored as answer.json
    - name: the site's name
    - fingerprint: the consortium's fingerprint as the coordinator read it out. None: it is compared
      with that of the answer stored before, so that a new certificate of the same consortium needs
      no second call.

    Errors: ConfigError if the answer or its plan is not valid or not for this site, or if no
    fingerprint is given and no answer was stored; Refused if the fingerprint differs."""
    if fingerprint is None and (kept := load_answer(keys, name)):
        fingerprint = kept.fingerprint
    if not fingerprint or not fingerprint.strip():
        raise ConfigError(
            f"{path}: nobody compared the consortium's fingerprint",
            "a person who heard it from the coordinator",
            "call the coordinator, and give the fingerprint that is read out with --fingerprint",
        )
    answer = read(path, tls_key(keys), name, fingerprint)
    plan_of(answer, path)
    content = json.dumps(asdict(answer), indent=1).encode() + b"\n"
    writing.replace(keys / KEPT, content, private=True)
    return answer


def load_answer(keys: Path, name: str, expected: str = "") -> Answer | None:
    """Return the answer that was stored when this site joined; None if the site has not joined.

    - keys: the folder of the site's network keys, which holds the answer
    - name: the site's name
    - expected: the consortium's fingerprint, as in site.toml; "": it is not compared

    Errors: ConfigError if the answer is not valid or not for this site; Refused if its fingerprint
    is not `expected`."""
    if not (keys / KEPT).exists():
        return None
    return read(keys / KEPT, tls_key(keys), name, expected)


def tls_key(keys: Path) -> EC:
    """Return the site's public TLS key. keys: the folder of its network keys. Errors: ConfigError
    if one of these keys is missing or cannot be read."""
    for name in ("node.key", "tls.key"):
        if not (keys / name).is_file():
            raise ConfigError(f"{keys / name}: no such file", todo="`fedtune enroll` makes it")
    return certs.read_key(keys / "tls.key").public_key()
