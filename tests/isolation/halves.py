"""Confine this process as a site's half does, and say what it then reaches, as JSON.

python halves.py vault|courier SITE"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedtune.client import vault_process
from fedtune.config import load_site
from fedtune.courier import process as courier


def main() -> None:
    half, path = sys.argv[1:]
    site = load_site(Path(path))
    means = vault_process.confine(site, 1) if half == "vault" else courier.confine(site)
    state, reached = site.site.state, []
    for file in (site.data.path, state / "site.key", state / "keys" / "node.key", Path(path)):
        try:
            os.close(os.open(file, os.O_RDONLY))
            reached.append(file.name)
        except OSError:
            pass
    for folder in (state, state / "keys", state / "keys" / "renewed", state / "flower"):
        try:
            (folder / "new").touch()
            (folder / "new").unlink()
            reached.append(f"writes {folder.name}")
        except OSError:
            pass
    print(json.dumps({"reached": reached, **means.facts()}))


if __name__ == "__main__":
    main()
