"""Every test here runs in strict mode unless it says otherwise."""

from __future__ import annotations

import pytest

from fedtune.observe.log import STRICT


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
