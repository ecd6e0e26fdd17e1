"""Sign a folder as a dossier, and read back the signed content.

    release.json           sha256 and size of every file in the folder except approvals/, and the
                           time, signed by the coordinator
    approvals/KEY.json     a person's or a site's signature over release.json's digest, with name,
                           role and reason

Both are canonical JSON, so that the same content always has the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.core.errors import NotGenuine
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.run_folder import ADAPTER
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence.dossier import pictures
from fedtune.evidence.dossier.assurance import crate, pack, registry
from fedtune.evidence.dossier.assurance.sections import ATTACKS, FOLDER
from fedtune.evidence.sign import RUN, sha256
from fedtune.evidence.signed_files import TODO, fail, signed_json

RELEASE, APPROVALS = "release.json", "approvals"
CONTENT = "dossier.json"
AUDIT = "audit.md"
PDF = "dossier.pdf"
# What a dossier may have beside the run's folder.
FILES = {
    *(CONTENT, AUDIT, PDF, "dossier.md", "dossier.html", "README.md", "sbom.cdx.json"),
    *("model.sig", "model.pub", *pictures.FILES),
    *(pack.JSON, pack.PAGE, registry.FILE, crate.FILE, *ATTACKS),
}
FORMAT, APPROVAL = "fedtune-release-1", "fedtune-approval-1"
PURPOSE, APPROVING = b"fedtune dossier\0", b"fedtune approval\0"
MOMENT = "%Y-%m-%dT%H:%M:%SZ"
LONGEST = 2000  # characters of what an approver says


def around(run: Path) -> Path | None:
    """Return the folder of the dossier that contains a run; None if the run is in no dossier."""
    folder = run.absolute().parent
    return folder if run.name == RUN and (folder / RELEASE).is_file() else None


def format_now() -> str:
    """Return the present time in UTC to the second, as a text such as 2026-03-01T09:30:00Z."""
    return datetime.now(UTC).strftime(MOMENT)


def list_covered(folder: Path) -> list[str]:
    """List every file that a dossier's signature must cover, by its path in the folder, sorted.
    Links count as files. Approvals and release.json are not covered. If the run in the dossier has
    a link adapter/ to the version in use, this link is left out too, since the run's report names
    the version."""
    names = []
    for parent, folders, files in os.walk(folder):
        at = Path(parent).relative_to(folder)
        if at == Path("."):
            folders[:] = [name for name in folders if name != APPROVALS]
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        names += [(at / name).as_posix() for name in (*files, *linked)]
    return sorted({*names} - {RELEASE, f"{RUN}/{ADAPTER}" if _links(folder) else RELEASE})


def _links(folder: Path) -> bool:
    return (folder / RUN / ADAPTER).is_symlink()


def sign(folder: Path, key: SigningKey, ca: str, made: str = "") -> None:
    """Sign a dossier: write release.json, which covers the folder's files as they are now.

    - folder: the dossier's folder
    - key: the coordinator's signing key, or one that was made for a simulation
    - ca: the certificate of the consortium's CA (PEM); "" for a simulation
    - made: the time of signing, as `format_now` writes it; the caller gives it if other files name
      it too. "": now

    Errors: InfrastructureError if the file cannot be written."""
    names = list_covered(folder)
    body = {
        "format": FORMAT,
        "ca": ca,
        "coordinator": key.public,
        "made": made or format_now(),
        "fedtune": __version__,
        "files": {name: sha256(folder / name) for name in names},
        "sizes": {name: (folder / name).stat().st_size for name in names},
    }
    signature = key.sign(PURPOSE + canonical(body))
    replace(folder / RELEASE, canonical(body | {"signature": signature}))


def read_release(folder: Path) -> tuple[dict[str, Any], str]:
    """Read a dossier's release.json, and check its signature by the key that it names itself.
    Return two things: its content without the signature, and its sha256 in hexadecimal, which
    approvals name. Errors: NotGenuine."""
    kinds = dict.fromkeys(("format", "ca", "coordinator", "made", "fedtune", "signature"), str)
    path = folder / RELEASE
    body, data = _read(path, FORMAT, kinds | dict.fromkeys(("files", "sizes"), dict))
    signature = body.pop("signature")
    if not verifies(body["coordinator"], PURPOSE + canonical(body), signature):
        fail(path, "its signature does not fit", "the signature of the key that it names")
    return body, hashlib.sha256(data).hexdigest()


def check_files(folder: Path, files: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Check that the files in a dossier's folder are exactly those that were signed, byte by byte.

    - folder: the dossier's folder
    - files: path of each signed file in the folder -> its sha256
    - sizes: path of each signed file in the folder -> its size in bytes

    Errors: NotGenuine if a file was changed, added or taken out."""
    present = list_covered(folder)
    for name in present:
        if name not in files:
            fail(folder / name, "was added after the signature", "the files that were signed")
        own = name.startswith(f"{FOLDER}/") and name.endswith(".toml")
        if name not in FILES and not own and not name.startswith(f"{RUN}/"):
            fail(folder / name, "is no file of a dossier", "files that `fedtune release` writes")
    for name, digest in files.items():
        path = folder / name
        if name not in present:
            fail(path, "is missing", "every file that was signed")
        if path.is_symlink():
            fail(path, "was changed after it was signed", "a file")
        reading.regular(path, "a file as it was signed", TODO, NotGenuine)
        if path.stat().st_size != sizes.get(name) or sha256(path) != digest:
            fail(path, "was changed after it was signed", f"sha256 {str(digest)[:16]}…")


def approval(release: str, key: SigningKey, name: str, role: str, reason: str) -> dict[str, Any]:
    """Build an approval of a dossier, signed with the approver's key. Return the content of its
    file.

    - release: the sha256 of the dossier's release.json, as `read_release` returns it
    - key: the approver's signing key; its public key goes into the approval
    - name, role: who approves, and in which role
    - reason: why the person approves"""
    body = {
        "format": APPROVAL,
        "release": release,
        "name": name,
        "role": role,
        "reason": reason,
        "date": format_now(),
        "key": key.public,
    }
    return body | {"signature": key.sign(APPROVING + canonical(body))}


def approvals(folder: Path, release: str) -> list[dict[str, Any]]:
    """Read and check every approval of a dossier. Return a list of their contents without the
    signatures; [] if there are none.

    - folder: the dossier's folder
    - release: the sha256 of its release.json, which the approvals must name

    Errors: NotGenuine if an approval is of another release or was changed, or another file lies
    among them."""
    inside, read = folder / APPROVALS, []
    if inside.is_symlink():
        fail(inside, "is a link", "the approvals' own folder")
    paths = sorted(inside.iterdir()) if inside.is_dir() else []
    kinds = dict.fromkeys(("format", "release", "name", "role", "reason", "date", "key"), str)
    for path in paths:
        body, _ = _read(path, APPROVAL, kinds | {"signature": str})
        signature = body.pop("signature")
        if path.name != file_name(body["key"]):
            fail(path, "is not named after its key", file_name(body["key"]))
        if not verifies(body["key"], APPROVING + canonical(body), signature):
            fail(path, "its signature does not fit", "the signature of the key that it names")
        if body["release"] != release:
            fail(path, "approves another release", "an approval of this dossier's release.json")
        read.append(body)
    return read


def file_name(key: str) -> str:
    """Return the name of the file that holds an approval. key: the public key that signed it, in
    hexadecimal."""
    return f"{key[:16]}.json"


def _read(path: Path, form: str, kinds: Mapping[str, type]) -> tuple[dict[str, Any], bytes]:
    """Read a signed file. It must have exactly the fields of `kinds`, and the value `form` in
    "format". Return two things: its content, and its bytes.

    - path: the file
    - form: the name of the file's format
    - kinds: name of a field -> the type that its value must have

    Errors: NotGenuine."""
    body, data = signed_json(path, form)
    if {name: type(value) for name, value in body.items()} != kinds:
        fail(path, "does not have the fields of a signed file", ", ".join(kinds))
    return body, data
