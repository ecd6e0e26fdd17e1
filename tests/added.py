"""A pytest plug-in: the files in the folder FEDTUNE_ADDED are modules of this release too.

`python -m pytest -p tests.added`; its subfolders lie as the packages do: core/objectives."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

FOLDER = Path(os.environ["FEDTUNE_ADDED"])
for folder in {file.parent for file in FOLDER.rglob("*.py")}:
    package = ".".join(("fedtune", *folder.relative_to(FOLDER).parts))
    importlib.import_module(package).__path__.append(str(folder))
