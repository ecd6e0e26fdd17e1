"""What a site has on disk is counted by the file, under its name and not its draft's."""

from __future__ import annotations

import pytest

from benchmarks.durable import PROTECTS, SYNC, kind_of


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/w/state/ledger.db-journal", "ledger.db-journal"),
        ("/w/state", "state/"),
        ("/w/state/ledger.head.0f1e2d3c.41.new", "ledger.head"),
        ("/w/state/outbox", "outbox/"),
        ("/w/state/outbox/ab-1-cd.bin.0f1e2d3c.41.new", "outbox/*"),
    ],
)
def test_a_sync_is_counted_by_what_it_protects(path: str, kind: str) -> None:
    (found,) = SYNC.findall(f"41  fdatasync(4<{path}>)  = 0")
    assert kind_of(found) == kind and kind in PROTECTS


def test_a_sync_outside_a_sites_folder_is_the_coordinators() -> None:
    assert kind_of("/w/out/checkpoint/state.db") == "coordinator"
