"""Record the public records on which a continuous study's versions were compared. From this each
verdict can be computed again, and a new file that shares records with an earlier one is noticed.

    out/looks.key                  the key of the digests; it is never handed over with a run
    out/versions/looked.json       keyed digests of the records of each public file for comparisons,
                                   and of the public records that trained the model
    out/versions/look-N.json       the result of version N's comparison, record by record
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import reading, writing
from fedtune.core.wire.keys import canonical
from fedtune.evidence.sign import VERSIONS
from fedtune.evidence.versions import FORMAT, LOOKED, look_file
from fedtune.report.change_plan import Look
from fedtune.server.store import CheckpointError

KEY = "looks.key"


class Looked:
    """The keyed digests of the records on which the versions of the run in `out` were compared.

    - out: the run's folder
    - files: sha256 over name and content of a public file -> the digests of its records
    - apart: the digests of the public records that trained the model; None until they are
      computed"""

    def __init__(self, out: Path) -> None:
        """Read the digests from out/versions/looked.json, if this file exists. Errors:
        CheckpointError if it is damaged, or out/looks.key, the key by which the digests were made,
        is missing."""
        self._out = out
        self.files: dict[str, frozenset[str]] = {}
        self.apart: frozenset[str] | None = None
        path, key = out / VERSIONS / LOOKED, out / KEY
        if path.exists():
            expected, todo = "the file as it was written", "restore it from a copy"
            found = reading.json_in(path, expected, todo, CheckpointError)
            if found.get("format") != FORMAT or not key.exists():
                raise CheckpointError(f"{path}: damaged, or {KEY} is missing", expected, todo)
            self.files = {name: frozenset(each) for name, each in found["files"].items()}
            self.apart = frozenset(found["apart"])

    def key_digests(self, digests: Collection[str]) -> frozenset[str]:
        """Return the digests of records as HMACs under this run's key, so that nobody without the
        key can recognise a record. The first call makes the key. Errors: InfrastructureError."""
        path = self._out / KEY
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            writing.replace(path, secrets.token_bytes(32), private=True)
        key = reading.content(path, "the key as it was written", "restore it", InfrastructureError)
        return frozenset(hmac.digest(key, one.encode(), "sha256").hex()[:32] for one in digests)

    def note(self) -> None:
        """Write out/versions/looked.json, with keyed digests of the public records on which
        versions were compared (`files`), and of those that trained the model (`apart`).

        Errors: InfrastructureError."""
        files = {public: sorted(records) for public, records in self.files.items()}
        document = {"format": FORMAT, "files": files, "apart": sorted(self.apart or ())}
        writing.replace(self._out / VERSIONS / LOOKED, json.dumps(document).encode())

    def keep(self, version: int, look: Look, about: Mapping[str, object]) -> None:
        """Write the data of a comparison to out/versions/look-N.json. version: N, the version that
        was compared. look: the scores of both versions, record by record. about: further entries of
        the file. Errors: InfrastructureError."""
        content = {"format": FORMAT, **about, **look.as_dict()}
        writing.replace(self._out / look_file(version), canonical(content))
