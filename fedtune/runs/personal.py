"""Seal a site's personal model to the site's key, and open it for use at the site.

    STATE/personal/PLAN-ADAPTER.sealed    one for each released run; 0600, in a folder of 0700

The file's first line says that it is a personal model. Everything else is encrypted (AES-256-GCM)
under a key derived from the site's signing key and its ledger's salt: the trained arrays, how they
were chosen, and the salted hashes of the patients on whose records they were trained. The
encryption also authenticates the first line.

Guarantee: without the site's private key, only the first line and the length can be read. With
another salt, as after a restore of the ledger that made a new one, the model cannot be opened: the
site could not tell whether a patient who withdraws is among those on whom it was trained. An opened
model has no folder: any code that reads or writes a run's folder refuses the model
(NeverLeaves)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.core.config import Site
from fedtune.core.config.patient_columns import patient_column
from fedtune.core.errors import InputError
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.files import outbox_prefix
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.lora import Arrays, load_into
from fedtune.core.wire.keys import canonical
from fedtune.evidence.personal import FOLDER, HEADER, MARK, SUFFIX, NeverLeaves
from fedtune.evidence.told import digest_of_adapter
from fedtune.homes.opening import open_paying_ledger
from fedtune.runs.run import Run

PURPOSE = "personal model"
NONCE, LENGTH = 12, 8  # bytes: of AES-GCM's nonce, and of the length of what describes the arrays
LARGEST = 2**31  # bytes of a file
AGAIN = "fedtune personalise RUN --site SITE"


@dataclass(frozen=True)
class About:
    """The facts that are sealed with a personal model's arrays.

    - plan, adapter: the digests of the released run's plan and of its adapter
    - site, study: the names of the site and the study
    - units: salted hashes of the patients on whose records the model was trained
    - opt_outs: a salted digest of the site's list of opt-outs at that time, "" without one
    - chosen: the settings of the fit, as they were chosen on the site's own records
    - patient: the column that told patients apart, "" without one; None if an earlier release
      sealed the model"""

    plan: str
    adapter: str
    site: str
    study: str
    units: tuple[str, ...]
    opt_outs: str
    chosen: Mapping[str, float]
    patient: str | None = None


class PersonalRun(Run):
    """A site's personal model, used like a run: a released run, in which arrays that the site
    trained further replace the released ones.

    - shared: the released run
    - arrays: name -> array, for the arrays that the site trained further
    - about: the facts that were sealed with these arrays
    - digest: sha256 of the sealed file, in hexadecimal

    Guarantee: it has no `folder`, so that code which reads or writes a run's folder, such as
    export, merge, label or a dossier, cannot take it for a run that may be handed on. Errors:
    NeverLeaves if code asks for the folder."""

    def __init__(self, shared: Run, arrays: Arrays, about: About, digest: str) -> None:
        self.shared, self.about, self.digest = shared, about, digest
        self.study = shared.study
        self._arrays = arrays

    def __getattr__(self, name: str) -> Any:
        if name == "folder":
            raise NeverLeaves(repr(self))
        raise AttributeError(name)

    @property
    def place(self) -> Path:
        return self.shared.place

    @property
    def report(self) -> dict[str, Any]:
        """Raise NeverLeaves, since a personal model has no report: report.json is about the
        released model."""
        raise NeverLeaves(repr(self))

    @property
    def mark(self) -> str:
        """The text that is put before everything that this model writes, to warn readers:
        "[personal model of SITE, …]"."""
        return f"[personal model of {self.about.site}, {MARK}]"

    def adapter(self) -> Arrays:
        return {**self.shared.adapter(), **self._arrays}

    def start(self) -> Arrays | None:
        return self.shared.start()

    def load_peft(self, backbone: Any) -> Any:
        model = self.shared.load_peft(backbone)
        named = dict(model.named_parameters())
        load_into({name: named[name] for name in self._arrays}, self._arrays)
        return model

    def __fspath__(self) -> str:
        raise NeverLeaves(repr(self))

    def __repr__(self) -> str:
        return f"the personal model of {self.about.site} for {self.about.study}"

    def _line(self) -> str:
        return MARK


def personal_file(site: Site, run: Run) -> Path:
    """Return the path of the site's personal model for a released run, whether or not there is one.
    Its name begins with the same prefix as the site's other files of this study; by this prefix
    `fedtune purge` finds all of them."""
    name = f"{outbox_prefix(run.study.digest)}-{digest_of_adapter(run.folder)[:16]}{SUFFIX}"
    return site.site.state / FOLDER / name


def describe(run: Run, site: Site, ledger: Ledger, **trained: Any) -> About:
    """Return the facts that are sealed with a site's personal model of a released run. trained: the
    fields `units` and `chosen` of About. ledger: the site's ledger, which salts the digest of the
    opt-outs."""
    return About(
        plan=run.study.digest,
        adapter=digest_of_adapter(run.folder),
        site=site.site.name,
        study=run.study.study.name,
        opt_outs=_opt_outs(site, ledger),
        patient=patient_column(site.data),
        **trained,
    )


def seal(path: Path, arrays: Arrays, about: About, ledger: Ledger) -> None:
    """Encrypt a personal model and write it to a file that only this user can read. An earlier file
    is replaced.

    - path: the file, as `personal_file` names it
    - arrays: name -> array, for the arrays that the site trained further
    - about: the facts to seal with them
    - ledger: the site's ledger, from whose key and salt the encryption key is derived

    Errors: InfrastructureError."""
    from safetensors.numpy import save

    head = canonical({**vars(about), "units": list(about.units), "chosen": dict(about.chosen)})
    nonce = os.urandom(NONCE)
    content = len(head).to_bytes(LENGTH, "big") + head + save(arrays)
    sealed = HEADER + nonce + _cipher(ledger).encrypt(nonce, content, HEADER)
    replace(path, sealed, private=True)


def open_personal(run: Run, site: Site) -> PersonalRun:
    """Open this site's personal model for a released run.

    Errors: InputError if there is no such model, other users can read the file, it is another
    site's or another run's, or it was changed. InputError also if the model must be trained again,
    because a patient on whose records it was trained has withdrawn, another column tells patients
    apart by now, or the list of opt-outs has changed. LedgerError if the ledger cannot be read."""
    path = personal_file(site, run)
    if not os.path.lexists(path):
        raise InputError(f"{path}: this site has no personal model of {run.place}", todo=AGAIN)
    ledger = open_paying_ledger(site)
    content = reading.secret(path, "a personal model", most=LARGEST)
    about, arrays = _unsealed(path, content, ledger)
    if (about.plan, about.adapter) != (run.study.digest, digest_of_adapter(run.folder)):
        raise InputError(f"{path}: is of another run", f"a personal model of {run.place}", AGAIN)
    withdrawn = ledger.withdrawn()
    if any(unit in withdrawn for unit in about.units):
        raise _outdated(path, "a patient on whom it was trained has withdrawn")
    if about.patient != patient_column(site.data):
        raise _outdated(path, "another column tells patients apart than when it was trained")
    if about.opt_outs != _opt_outs(site, ledger):
        raise _outdated(path, "the list of opt-outs has changed since it was trained")
    return PersonalRun(run, arrays, about, hashlib.sha256(content).hexdigest())


def models_of(site: Site, ledger: Ledger, unit: str) -> list[Path]:
    """List this site's personal models that were trained on a patient's records, or may have been,
    since another column told patients apart then. A file that cannot be opened is left out: no
    command can use it.

    - site: the site
    - ledger: the site's ledger, whose key and salt open the files
    - unit: the patient's salted hash"""
    found = list[Path]()
    for path in sorted((site.site.state / FOLDER).glob(f"*{SUFFIX}")):
        with suppress(InputError):
            content = reading.secret(path, "a personal model", most=LARGEST)
            about, _ = _unsealed(path, content, ledger)
            # By another column the patient has another hash; no command uses the model either.
            if unit in about.units or about.patient != patient_column(site.data):
                found.append(path)
    return found


def _unsealed(path: Path, content: bytes, ledger: Ledger) -> tuple[About, Arrays]:
    from safetensors.numpy import load

    body = content.removeprefix(HEADER)
    try:
        if len(body) == len(content):
            raise ValueError("another format")
        plain = _cipher(ledger).decrypt(body[:NONCE], body[NONCE:], HEADER)
    except (InvalidTag, ValueError):
        raise InputError(
            f"{path}: cannot be opened with this site's key and its ledger's salt",
            "a file that this site sealed, unchanged, and since its ledger's salt was last made",
            AGAIN,
        ) from None
    size = LENGTH + int.from_bytes(plain[:LENGTH], "big")
    facts = json.loads(plain[LENGTH:size])
    return About(**facts | {"units": tuple(facts["units"])}), load(plain[size:])


def _cipher(ledger: Ledger) -> AESGCM:
    """Return the cipher that seals and opens a site's personal models. Its key follows from the
    ledger's key and from its salt, since the sealed hashes of patients are made with this salt and
    can be compared with no others. ledger: the ledger from which the site pays."""
    return AESGCM(ledger.key.derive(f"{PURPOSE} {ledger.hashed(PURPOSE.encode())}"))


def _outdated(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: {why}",
        "a personal model that was trained after this change",
        f"{AGAIN}; until then this model is not used",
    )


def _opt_outs(site: Site, ledger: Ledger) -> str:
    """Return a digest of the list of opt-outs, salted by the ledger, by which a change of the list
    is noticed; "" if the site has no list."""
    table = site.data.consent
    if table is None or table.opt_outs is None:
        return ""
    content = reading.secret(table.opt_outs, "a list of opt-outs", most=2**30)
    return ledger.hashed(b"opt-outs\0" + hashlib.sha256(content).digest())
