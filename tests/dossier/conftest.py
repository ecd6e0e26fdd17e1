"""A signed run's dossier, with what a person typed for one of its blanks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.core.wire.keys import SigningKey
from fedtune.evidence.dossier import seal
from fedtune.evidence.dossier.release import release

CONTACT = "Data office <data@example.org>, room 7 & 8"


@pytest.fixture(scope="session")
def released(signed: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("released") / "dossier"
    return folder, release(signed[0], folder, details={"contact": CONTACT})


def again(copy: Path) -> Path:
    """Sign a changed dossier with a key of the forger's, as at the moment of the first
    signature."""
    seal.sign(copy, SigningKey(), "", seal.read_release(copy)[0]["made"])
    return copy
