"""Judge a finished model at a site, and store the decision: page, figures, and a signed record.

    STATE/acceptance/TIME/record.json    the decision, its rules, and digests of model and records
    STATE/acceptance/TIME/figures.json   every figure, and the rows of the worst errors
    STATE/acceptance/TIME/page.html      the same as a page to read and print

Only this site's user can read these files (0600). The record is signed by the site's key; the audit
log holds the record's sha256, and no figure. Guarantee: no code that sends data reads any of these
files. Only `tell`, which a person calls on purpose, copies the decision, its time and the model's
digests from a record into a statement for the coordinator."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedtune.core.config import AcceptanceTable, Site
from fedtune.core.config.state_files import ACCEPTANCE, FIGURES, PAGE, RECORD
from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.audit_log import AuditLog, login, person
from fedtune.core.ledger.ledger import signing_key
from fedtune.core.run_folder import SIGNATURE
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence.personal import NeverLeaves
from fedtune.evidence.sign import sha256
from fedtune.evidence.told import digest_of_adapter, state
from fedtune.homes.opening import open_paying_ledger
from fedtune.officer.acceptance.figures import figures_of
from fedtune.officer.acceptance.judgement import Decision
from fedtune.officer.acceptance.models import score_models
from fedtune.officer.acceptance.page import page
from fedtune.runs.personal import PersonalRun
from fedtune.runs.run import Run, open_run

FORMAT = "fedtune-acceptance-1"
PURPOSE = b"fedtune acceptance\0"
DECIDED = (
    *("decision", "judged", "different", "comparisons", "patients", "records", "least_group"),
    *("training_read", "known_since"),
)


@dataclass(frozen=True)
class Acceptance:
    """A site's decision about a model.

    - decision: accepted, refused or not resolved
    - folder: the folder with the record, the figures and the page
    - figures: the content of figures.json"""

    decision: Decision
    folder: Path
    figures: dict[str, Any]


def accept(run: Run | Path | str, site: Site) -> Acceptance:
    """Judge a finished run, or the run in a dossier, by this site's [acceptance], on the site's own
    held-out records. The figures are exact, without noise, and stay at the site.

    Patients on whom a study here trained or was to train, or who withdrew, are left out. The base,
    the public start (if the run's folder still has it) and the site's own model, if it named one,
    are measured on the same records. If the run is a personal model, so is the released model from
    which the personal one was made.

    run: a run, or the path of its folder or dossier. site: the site whose [acceptance] states the
    records and the rules.

    Returns: the decision, its figures, and the folder to which they were written.

    >>> import fedtune
    >>> fedtune.accept(fedtune.Run("runs/none"), fedtune.load_site("no/site.toml"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Guarantee: nothing is sent, and nothing in the run's folder is changed. The decision is an exact
    fact about patients, which no ε covers: only a person may tell it to others.

    Errors: ConfigError (no [acceptance], or a threshold that does not fit the run), DataError,
    ModelError, LedgerError, InfrastructureError."""
    run = run if isinstance(run, Run) else open_run(run)
    if (table := site.acceptance) is None:
        raise ConfigError(
            "site.toml states no rules by which to judge a model",
            "[acceptance] in site.toml, with records and thresholds",
            "write the rules before anybody sees a figure: docs/acceptance.md",
        )
    ledger = open_paying_ledger(site)
    scored = score_models(run, table, site, ledger)
    study = run.study.study.name
    study += " (this site's personal model)" if isinstance(run, PersonalRun) else ""
    figures: dict[str, Any] = {"study": study, "site": site.site.name}
    figures |= figures_of(table, scored)
    key = signing_key(site, ledger)
    figures["looks"] = count_earlier(site.site.state, key.public, scored.held_out.keyed)
    record = _sign_record(run, table, scored.held_out.keyed, figures, key)
    content = canonical(record)
    folder = site.site.state / ACCEPTANCE / _name(record)
    AuditLog(ledger.folder, ledger.key).add(
        "assess",
        model=record["model"]["adapter"],
        settings=record["settings"],
        record=hashlib.sha256(content).hexdigest(),
    )
    replace(folder / RECORD, content, private=True)
    text = json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False)
    replace(folder / FIGURES, (text + "\n").encode(), private=True)
    replace(folder / PAGE, page(figures, record).encode(), private=True)
    return Acceptance(figures["decision"], folder, figures)


def tell(run: Run | Path | str, site: Site, to: Path | str) -> Decision:
    """Write to `to` a signed statement for the coordinator with this site's last decision about a
    model (accepted, refused or not resolved), and return the decision. The statement holds no
    figure, and nothing is judged again.

    A person must call this on purpose: a reader of the statement learns an exact fact about
    held-out patients, which no ε covers. The site's audit log gets an entry about the statement.
    run: a run, or the path of its folder or dossier. Errors: InputError if nothing was decided
    about this model, or the file `to` exists; NeverLeaves if the model is a personal one."""
    run, to = run if isinstance(run, Run) else open_run(run), Path(to)
    if isinstance(run, PersonalRun):
        raise NeverLeaves(repr(run))
    ledger = open_paying_ledger(site)
    key = signing_key(site, ledger)
    model, records = _model(run), dict[tuple[str, int], dict[str, Any]]()
    for path in (site.site.state / ACCEPTANCE).glob(f"*/{RECORD}"):
        record = read_record(path, key.public)
        if all(record["model"][part] == model[part] for part in ("plan", "adapter")):
            records[record["time"], path.stat().st_mtime_ns] = record
    if not records:
        raise InputError(
            f"{run.folder}: this site has made no decision about this model",
            "a decision, which a person reads before it is told to the coordinator",
            "fedtune accept RUN --site SITE, without --tell",
        )
    if to.exists():
        raise InputError(f"{to}: exists", "a new file", "name another file with --tell")
    record = records[max(records)]
    statement = state(record, key)
    AuditLog(ledger.folder, ledger.key).add(
        "assess", "told", record=hashlib.sha256(canonical(record)).hexdigest()
    )
    replace(to, statement, private=True)
    return cast(Decision, record["decision"])


def _sign_record(
    run: Run, table: AcceptanceTable, keyed: str, figures: dict[str, Any], key: SigningKey
) -> dict[str, Any]:
    """Build and sign the record of a decision; return it with its signature.

    - run: the judged run, whose plan, base and adapter the record names by their digests
    - table: the site's [acceptance], whose digest the record holds
    - keyed: the salted digest of the held-out records (HeldOut.keyed)
    - figures: the content of figures.json; the record takes over the fields that DECIDED lists, the
      names of site and study, and the counts of earlier decisions
    - key: the site's signing key"""
    body: dict[str, Any] = {
        "format": FORMAT,
        "site": figures["site"],
        "study": figures["study"],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "login": login(),
        "person": person(),
        **{name: figures[name] for name in DECIDED},
        "model": _model(run),
        "settings": table.digest,
        "held_out": keyed,
        "looks": figures["looks"],
        "key": key.public,
    }
    return body | {"signature": key.sign(PURPOSE + canonical(body))}


def _model(run: Run) -> dict[str, str]:
    """Return what identifies the judged model: name -> value, each value a text.

    - plan: the digest of the plan
    - base: the digest of the base, or the base's name if the plan holds no digest
    - adapter: the digest of the adapter's files; of a personal model, the digest of its sealed file
    - signature: the sha256 of the file with the run's signature; "" if there is none"""
    facts = {
        "plan": run.study.digest,
        "base": run.study.base.digest or run.study.base.model,
    }
    if isinstance(run, PersonalRun):  # a digest of the sealed file reveals nothing of its content
        return facts | {"adapter": run.digest, "signature": ""}
    signature = run.folder / SIGNATURE
    signed = sha256(signature) if signature.is_file() else ""
    return facts | {"adapter": digest_of_adapter(run.folder), "signature": signed}


def _name(record: dict[str, Any]) -> str:
    """Return the name of a decision's folder: the time, and the start of the record's signature,
    since several decisions may fall in one second."""
    return f"{record['time'].replace(':', '')}-{record['signature'][:8]}"


def read_record(path: Path, public: str) -> dict[str, Any]:
    """Return the content of the record of a decision, with its signature. path: the file
    record.json. public: the site's public signing key, in hexadecimal. Errors: InputError unless
    the site with this key signed the record."""
    record = reading.json_in(path, "the record of an acceptance")
    body = {key: value for key, value in record.items() if key != "signature"}
    try:
        genuine = verifies(public, PURPOSE + canonical(body), str(record.get("signature")))
    except ValueError:  # the file has NaN or Infinity, which cannot be signed
        genuine = False
    if not genuine:
        raise InputError(f"{path}: not signed by this site", "a record as this site wrote it")
    return record


def count_earlier(state: Path, public: str, keyed: str) -> dict[str, int]:
    """Return three counts about the earlier decisions at this site on the same records: "earlier",
    the number of these decisions; "models" and "settings", the numbers of different models and of
    different settings among them. With each further decision it becomes more probable that a model
    is accepted by chance.

    state: the site's state folder, where the records of decisions lie. public: the key by which
    they must be signed; other files are skipped. keyed: the salted digest of the held-out records
    (HeldOut.keyed)."""
    models = set[str]()
    settings = set[str]()
    number = 0
    for path in sorted((state / ACCEPTANCE).glob(f"*/{RECORD}")):
        try:
            record = read_record(path, public)
        except InputError:
            continue
        if record["held_out"] == keyed:
            number += 1
            models.add(record["model"]["adapter"])
            settings.add(record["settings"])
    return {"earlier": number, "models": len(models), "settings": len(settings)}
