"""Confine this process as a site's half does, and say what it then reaches, as JSON.

python halves.py vault|courier SITE [SPOOL]"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedtune.core.config import load_site
from fedtune.core.vault import process as vault_process
from fedtune.core.wire.spool import Spool
from fedtune.courier import process as courier


def main() -> None:
    half, path, *folder = sys.argv[1:]
    site, spool = load_site(Path(path)), Spool(Path(folder[0])) if folder else None
    means = vault_process.confine(site, 1) if half == "vault" else courier.confine(site, spool)
    state, reached = site.site.state, []
    files = [site.data.path, state / "site.key", state / "keys" / "node.key", Path(path)]
    folders = [state, state / "keys", state / "keys" / "renewed", state / "flower"]
    if spool:
        files.append(spool.answers / ("0" * 64))
        folders += [spool.path, spool.answers, spool.requests]
    for file in files:
        try:
            os.close(os.open(file, os.O_RDONLY))
            reached.append(file.name)
        except OSError:
            pass
    for each in folders:
        try:
            (each / "new").touch()
            (each / "new").unlink()
            reached.append(f"writes {each.name}")
        except OSError:
            pass
    print(json.dumps({"reached": reached, **means.facts()}))


if __name__ == "__main__":
    main()
