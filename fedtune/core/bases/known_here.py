"""Record by digest the folders of bases and runs that people on this machine have named.

A folder is recorded in the cache whenever a user names it in a command, a study.toml or a
site.toml. A plan from elsewhere can then find, by digest, only what people on this machine
chose."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.core.registry import process_cache

_noted: dict[tuple[Path, str], tuple[str, Path]] = process_cache.register("places of bases", {})


def note(cache: Path, digest: str, name: str, folder: Path) -> None:
    """Record the name and the folder of the base or run with this digest; the newest record counts.

    - cache: fedtune's cache folder (`find.cache_dir`), in which the record is a file
    - digest: "sha256:…" of the base, or of the run as a model
    - name: what messages call it: the Hub's name, or the last part of the folder's path
    - folder: the folder with its files, which is recorded as an absolute path

    If the cache cannot be written, the record lasts for this process only."""
    location = name, folder.resolve()
    if _noted.get((cache, digest)) == location:
        return
    _noted[cache, digest] = location
    with suppress(OSError, InfrastructureError):
        file = _file(cache, digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, json.dumps({"name": name, "folder": str(location[1])}).encode())


def look_up(cache: Path, digest: str) -> tuple[str, Path] | None:
    """Return the name and the folder that were recorded last for `digest`; None if nothing was
    recorded. If that folder is gone, or the record in the cache cannot be read, return what this
    process itself recorded, or None. The folder's content is not checked."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(_file(cache, digest).read_text(encoding="utf-8"))
        if (folder := Path(entry["folder"])).is_dir():
            return str(entry["name"]), folder
    return _noted.get((cache, digest))


def _file(cache: Path, digest: str) -> Path:
    return cache / "here" / f"{digest.removeprefix('sha256:')}.json"
