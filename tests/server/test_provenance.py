"""What a report says of how its run was made, from a run with stand-ins for the sites."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

from fedtune.report.markdown import markdown
from fedtune.server import provenance
from tests.server.fakes import FakeSite
from tests.server.rounds_kit import three


def test_a_run_notes_when_it_began_and_ended_and_who_signed(trial):
    before = datetime.now(UTC).replace(microsecond=0)
    body = trial(*three()).run()
    ran = body["ran"]
    began, ended = (datetime.fromisoformat(ran[key]) for key in ("began", "ended"))
    assert began <= ended <= datetime.now(UTC) and (before - began).total_seconds() <= 1
    assert ran["versions"]["flwr"] and ran["versions"]["fedtune"] == body["fedtune"]
    assert ran["machine"]["system"].startswith(platform.system()) and ran["machine"]["cores"] > 0
    assert body["settings"]["rounds"] == len(body["rounds"])
    for name, site in body["signed"].items():
        assert site["updates"] == sum(name in r["participants"] for r in body["rounds"])
        assert site["key"] == body["privacy"]["sites"][name]["key"]
    text = markdown(body)
    assert "## When and where" in text and "## Who took part and signed" in text


def test_a_site_that_missed_rounds_signed_fewer(trial):
    body = trial(FakeSite("a"), FakeSite("b"), FakeSite("c", script={2: OSError()})).run()
    counts = {name: site["updates"] for name, site in body["signed"].items()}
    assert counts["a"] == len(body["rounds"]) > counts["c"]


def test_no_machine_is_named(trial):
    """Who reads a report learns what ran, not where on a hospital's or a laboratory's network."""
    body = trial(*three()).run()
    assert platform.node() not in json.dumps([body["ran"], body["settings"]])


def test_a_gpu_is_named_where_there_is_one(monkeypatch):
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda _: "A GPU"
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert provenance.machine()["gpu"] == "2 × A GPU"
    cuda.is_available = lambda: False
    assert "gpu" not in provenance.machine()


def test_rounds_of_an_earlier_release_have_no_times(trial):
    old = SimpleNamespace(history=[{"seconds": 1.0}, {"seconds": 1.0, "ended": "2026-05-04"}])
    assert provenance._times(old.history) == {}
