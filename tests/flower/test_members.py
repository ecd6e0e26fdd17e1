"""A coordinator hears whom its registry and its SuperLink gain and lose, each once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.flower import api, enrol
from fedtune.launch import coordinator


def test_each_change_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry: dict[str, Any] = {}
    connected: dict[int, str] = {}
    monkeypatch.setattr(enrol, "registry", lambda home: dict(registry))
    monkeypatch.setattr(api, "node_keys", lambda grid: dict(connected))
    heard: list[tuple[str, str]] = []
    members = coordinator.Members(tmp_path, lambda event, data: heard.append((event, data["text"])))

    def changes() -> list[tuple[str, str]]:
        heard.clear()
        members(SimpleNamespace())  # type: ignore[arg-type]
        members(SimpleNamespace())  # type: ignore[arg-type]
        return list(heard)

    registry["north"] = SimpleNamespace(name="north", node="k1", signing="s")
    assert changes() == []  # they were listed when the coordinator began to listen
    registry["south"] = SimpleNamespace(name="south", node="k2", signing="s")
    connected |= {1: "k1", 7: "a stranger's"}
    told = "1 of 2 admitted sites are connected"
    assert changes() == [
        ("admitted", f"south: admitted; {told}"),
        ("connected", f"north: connected; {told}"),
    ]
    connected.clear()
    del registry["south"]
    told = "0 of 1 admitted sites are connected"
    assert changes() == [
        ("revoked", f"south: revoked; {told}"),
        ("disconnected", f"north: disconnected; {told}"),
    ]
