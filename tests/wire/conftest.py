"""The `trial` fixture: a coordinator over fake sites."""

import pytest

from tests.server.fakes import trial
from tests.wire.hostile_kit import ENCODINGS, wire

__all__ = ["trial"]


@pytest.fixture(params=ENCODINGS)
def _encoded(request: pytest.FixtureRequest) -> None:
    wire.encoding = request.param
