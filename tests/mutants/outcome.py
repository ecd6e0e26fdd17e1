"""A pytest plugin for the runner: how each test ended, and whether it was an assertion that failed.

An assertion is an AssertionError or pytest's own failure (DID NOT RAISE, pytest.fail), raised by a
test and not by the code under test."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Generator
from pathlib import Path

import pytest

SHIPPED = ("fedtune", "server", "client")
_found: list[dict[str, str]] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and call.excinfo is not None:
        assertion = call.when == "call" and is_assertion(call.excinfo.value)
        kind = "assertion" if assertion else "other"
        words = f"{call.excinfo.type.__name__}: {call.excinfo.value}".splitlines()[0]
        _found.append({"test": item.nodeid, "kind": kind, "words": words[:200]})
        if assertion and not os.environ.get("FEDTUNE_OUTCOME_ALL"):
            item.session.shouldstop = "killed"
    return report


def is_assertion(error: BaseException) -> bool:
    """Return whether a test's own assertion failed; of a group, such as a property's several
    counterexamples, each of them."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_assertion, error.exceptions))
    if not isinstance(error, AssertionError | pytest.fail.Exception):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised, here = Path(frames[-1].filename).resolve(), Path.cwd().resolve()
    return not any(raised.is_relative_to(here / package) for package in SHIPPED)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        words = str(report.longrepr).splitlines()[-1][:200]
        _found.append({"test": report.nodeid, "kind": "other", "words": words})


def pytest_sessionfinish() -> None:
    if path := os.environ.get("FEDTUNE_OUTCOME"):
        Path(path).write_text(json.dumps(_found))
