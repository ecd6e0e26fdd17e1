"""Sign a finished run: put the sites' evidence, the figures and the adapter under one signature.

    RUN/evidence.json    the site's seal and step log of every update that was counted
    RUN/signature.json   sha256 of the folder's files, signed by the coordinator's key

Both are canonical JSON, so that the same content always has the same bytes. evidence.json holds the
sites' signed messages, with a digest in place of the arrays: it contains step logs and no
update."""

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
VERSIONS = "versions"  # a folder in a run with a [schedule]; ADAPTER is then a link into it
RUN = "run"  # a folder in an exported model, with the run from which it was made
INDEX = "index.json"  # the index of versions; the signed report holds the same content
# These change after the run was signed, when a person chooses another version.
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
    """Sign a run: write evidence.json and signature.json into its folder.

    - run: the run's folder, which holds all other files already
    - study: the run's plan
    - key: the coordinator's signing key
    - ca: the certificate of the consortium's CA (PEM); "" in a simulation
    - keys: site -> its public signing key
    - registry: admitted site -> its other two public keys, "node" and "tls"
    - history: an entry for each round, with the sites' signed messages under "evidence" (updates)
      and "query_evidence" (answers)

    Errors: InfrastructureError if a file cannot be written."""
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
    """Write signature.json, which signs the files of a run's folder as they are now. key: the
    coordinator's signing key; ca: the certificate of the consortium's CA (PEM); "" for a
    simulation.

    Errors: InfrastructureError if the file cannot be written."""
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
    """Return a file's sha256 in hexadecimal. The file is read in pieces, since an adapter may be
    large."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_covered(run: Path) -> list[str]:
    """List the files that a run's signature must cover, by their paths in the run's folder. These
    are the files named in FILES, if they exist; all files of the adapter or, in a continuous study,
    of all versions; and, if the public start is released, the files of the trained adapter."""
    inside = run / (VERSIONS if (run / ADAPTER).is_symlink() else ADAPTER)
    trained = run / TRAINED
    paths = [*sorted(inside.rglob("*")), trained, *sorted(trained.rglob("*"))]
    found = [path for path in paths if path.is_symlink() or (path.exists() and not path.is_dir())]
    names = [path.relative_to(run).as_posix() for path in found]
    listed = [name for name in names if name not in UNSIGNED]
    return [*(name for name in FILES if os.path.lexists(run / name)), *listed]


def carry(run: Path, into: Path) -> None:
    """Copy the files that a run's signature covers, and the signature, into the subfolder `run`
    (RUN) of an exported model or a dossier. If the run's adapter is a link to the version in use,
    make the same link there.

    - run: the run's folder
    - into: the folder of the model or dossier"""
    for name in (*list_covered(run), SIGNATURE):
        target = into / RUN / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, target)
    if (run / ADAPTER).is_symlink():
        (into / RUN / ADAPTER).symlink_to((run / ADAPTER).readlink())
