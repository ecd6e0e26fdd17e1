"""An admitted site that answers in another's name, through the real server: it speaks for itself
alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.network.kit import OFF, SITES, consortium, until

AS_NORTH = """
import fedtune.core.vault.worker
says = fedtune.core.vault.prepared.Admission(False, "policy.max_epsilon", "north", 7)
fedtune.core.vault.worker.SiteWorker.prepare = lambda self, *_: says
"""


@pytest.mark.long
def test_a_refusal_in_another_sites_name_is_its_senders(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, OFF, rounds=2, min_sites=2)
        made.broken["south"] = AS_NORTH
        server = made.server()
        until(made.listens, 120, made.told)
        for name in sorted(SITES, reverse=True):  # south is there before north
            made.join(name)
            made.client(name, "--once")
        assert server.wait(300) == 0, made.told()
        body = made.report()
        assert [entry["participants"] for entry in body["rounds"]] == 2 * [["east", "north"]]
        assert body["sites"]["south"] == "refused: policy.max_epsilon"
        assert body["sites"]["north"] == "admitted"
