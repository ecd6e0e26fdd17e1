"""Fixtures of these tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flower.gateway_kit import Upstream, World


@pytest.fixture()
def world(tmp_path: Path) -> Iterator[World]:
    upstream = Upstream(tmp_path / "upstream")
    thread = threading.Thread(target=upstream.serve_forever, args=(0.05,))
    thread.start()
    yield World(tmp_path, upstream)
    upstream.shutdown()
    thread.join()
    upstream.server_close()
