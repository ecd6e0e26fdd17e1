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


@pytest.fixture
def without_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's self-test takes seconds for each kind of study: half of some tests that are about
    something else. tests/dp/test_selftest.py, test_site.py and every study elsewhere run it."""
    monkeypatch.setattr("fedtune.core.vault.worker.self_test", lambda *_: None)
