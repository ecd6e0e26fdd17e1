"""A distribution that is installed for one test: a module and its entry points on sys.path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    text: str,
    entry_points: dict[str, dict[str, str]],
) -> None:
    """Lay out `module` with `entry_points`, as {group: {name: "module:Class"}}, and put it on
    sys.path until the test is over."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, module, sys)  # so that what was there before comes back
    del sys.modules[module]
