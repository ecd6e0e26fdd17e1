"""Fixtures of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.vault.worker import SiteWorker
from tests.client.site_kit import make_site, notes


@pytest.fixture
def worker(tmp_path: Path) -> SiteWorker:
    notes(tmp_path)
    return SiteWorker(make_site(tmp_path, patient="who"))
