"""The `trial` fixture: a coordinator over fake sites."""

from tests.server.fakes import trial

__all__ = ["trial"]
