"""A pytest plug-in: the files in the folder FEDTUNE_ADDED are modules of this release too.

`python -m pytest -p tests.added`; its subfolders are named as the packages, such as strategies."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

for folder in Path(os.environ["FEDTUNE_ADDED"]).iterdir():
    importlib.import_module(f"fedtune.{folder.name}").__path__.append(str(folder))
