"""The documentation site, built once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.browser import browser
from tests.docs.site import build

__all__ = ["browser"]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="zensical is in the docs extra (make docs)")
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    return folder / "build" / "site"
