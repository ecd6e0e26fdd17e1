"""The checks before a site joins, for the property."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import fedtune.cli.halves
import fedtune.launch.site
from fedtune.core.errors import FedtuneError
from fedtune.officer.before_joining import check_before_joining


class Joined(BaseException):
    """Raised where `fedtune client` has checked everything that it checks and would now connect."""


def joins(site: Path, watch: bool) -> bool:
    """Whether `fedtune client` comes as far as connecting to the coordinator."""

    def connect(*_: object) -> None:
        raise Joined

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedtune.launch.site, "read_link", connect)
        # What is checked in a process of its own is checked in this one, where a test can break it.
        patch.setattr(fedtune.launch.site, "check", lambda site, _: check_before_joining(site))
        try:
            fedtune.cli.halves.client(site, once=True, watch=watch)
        except Joined:
            return True
        except FedtuneError:
            return False
    raise AssertionError("it neither joined nor said why not")
