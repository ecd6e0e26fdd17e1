"""Sign a run: the sites' evidence, the figures and the adapter, under one signature.

    RUN/evidence.json    of every update that was counted: the site's seal and its step log
    RUN/signature.json   sha256 of the folder's files, signed by the coordinator's key

Both are canonical JSON, so that each content has one form. The sites' signed messages are stored
completely except for the arrays, of which only the digest is stored: the step log is in it, the
update is not."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.core.config import Study
from fedtune.core.files.writing import replace
from fedtune.core.run_folder import ADAPTER, SIGNATURE, TRAINED
from fedtune.core.wire.keys import SigningKey, canonical

EVIDENCE = "evidence.json"
FORMAT = "fedtune-evidence-1"
PURPOSE = b"fedtune run\0"
FILES = ("plan.json", "report.json", "report.md", "progress.png", "metrics.jsonl", EVIDENCE)
VERSIONS = "versions"  # in a study with a [schedule], where ADAPTER is a link to one of them
RUN = "run"  # in an exported model: the folder of what it was made of
INDEX = "index.json"  # says what the signed report says too
# A person may choose another version later, and a process may be about to.
UNSIGNED = {f"{VERSIONS}/{INDEX}", f"{VERSIONS}/lock"}


def sign(
    run: Path,
    study: Study,
    key: SigningKey,
    ca: str,
    keys: Mapping[str, str],
    registry: Mapping[str, Mapping[str, str]],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write evidence.json and signature.json.

    key, ca: the coordinator's, as the consortium's fingerprint holds them; keys: each site's public
    signing key; registry: an admitted site's other two; history: the rounds, with what sites
    signed. Errors: InfrastructureError."""
    sites = {name: {**registry.get(name, {}), "signing": keys[name]} for name in sorted(keys)}
    content = {
        "format": FORMAT,
        "plan": study.digest,
        "sites": sites,
        "updates": [*_updates(history)],
    }
    replace(run / EVIDENCE, canonical(content))
    sign_files(run, key, ca)


def sign_files(run: Path, key: SigningKey, ca: str = "") -> None:
    """Write signature.json over the folder's files as they are now. Errors: InfrastructureError."""
    files = {name: sha256(run / name) for name in list_covered(run)}
    sizes = {name: (run / name).stat().st_size for name in files}
    signed = {"format": FORMAT, "ca": ca, "coordinator": key.public, "files": files, "sizes": sizes}
    signature = key.sign(PURPOSE + canonical(signed))
    replace(run / SIGNATURE, canonical(signed | {"signature": signature}))


def _updates(history: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in history:
        for kind, name in (("update", "evidence"), ("answer", "query_evidence")):
            for site, sealed in sorted((entry.get(name) or {}).items()):
                yield {"round": entry["round"], "kind": kind, "site": site, **sealed}


def sha256(path: Path) -> str:
    """Hash a file in pieces, since an adapter may be large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_covered(run: Path) -> list[str]:
    """List the files that a signature must cover: the existing ones of FILES, all of the
    adapter, or of the versions of which it is one, and the trained adapter if it was not
    released."""
    inside = run / (VERSIONS if (run / ADAPTER).is_symlink() else ADAPTER)
    trained = run / TRAINED
    paths = [*sorted(inside.rglob("*")), trained, *sorted(trained.rglob("*"))]
    found = [path for path in paths if path.is_symlink() or (path.exists() and not path.is_dir())]
    names = [path.relative_to(run).as_posix() for path in found]
    listed = [name for name in names if name not in UNSIGNED]
    return [*(name for name in FILES if os.path.lexists(run / name)), *listed]


def carry(run: Path, into: Path) -> None:
    """Copy a run's signed files, and its signature, to a folder inside an exported model."""
    for name in (*list_covered(run), SIGNATURE):
        target = into / RUN / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, target)
    if (run / ADAPTER).is_symlink():
        (into / RUN / ADAPTER).symlink_to((run / ADAPTER).readlink())
