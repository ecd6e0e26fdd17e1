"""A signed run's dossier, with what a person typed for one of its blanks."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.evidence.dossier.release import release

CONTACT = "Data office <data@example.org>, room 7 & 8"


@pytest.fixture(scope="session")
def released(signed: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("released") / "dossier"
    return folder, release(signed[0], folder, details={"contact": CONTACT})
