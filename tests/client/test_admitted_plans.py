"""Plans that a site's rules admit without a person: what a coordinator that sends them without end
may not take from the ledger."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedtune.core.config import Site
from fedtune.core.files.room import ROOM
from fedtune.core.ledger import audit_log
from fedtune.core.vault import studies
from fedtune.core.vault.worker import _workers
from tests.client.site_kit import begun, room_of
from tests.client.test_waiting_plans import a_site, asked
from tests.disks import disk

pytestmark = pytest.mark.usefixtures("without_self_test")


def entries(site: Site) -> int:
    return len((site.site.state / audit_log.FILE).read_text().splitlines())


def test_so_many_studies_are_under_way_at_most(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a count of plans, which is public; one that is under way already is admitted again."""
    monkeypatch.setattr(studies, "MOST", 2)
    site, place = a_site(tmp_path, "standing")
    plans = [begun(tiny_base).study.changed(study={"name": f"s{n}"}) for n in range(3)]
    assert [asked(place, plan)[0] for plan in plans[:2]] == ["admitted"] * 2
    status, reason = asked(place, plans[2])
    assert status == "refused" and "too many studies are running" in reason
    assert asked(place, plans[0])[0] == "admitted"
    assert len(studies.under_way(site.site.state)) == 2
    studies.end(site.site.state, plans[1].digest)
    assert asked(place, plans[2])[0] == "admitted"
    assert len(_workers[place.site]._prepared) == 2


def test_plans_that_are_admitted_take_nothing_of_the_ledgers_room(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An act for which the disk has no space beside the room is not in the audit log, is said here
    and is answered alike. Twin: with space it is entered."""
    study = begun(tiny_base).study
    with disk(tmp_path / "disk", megabytes=24) as made:
        site, place = a_site(made.path, "standing")
        first, before = asked(place, study), entries(site)
        room = (site.site.state / ROOM).stat().st_size
        assert first[0] == "admitted" and room == room_of(site)
        with made.with_room_for(6000), caplog.at_level(logging.WARNING):
            assert asked(place, study.changed(study={"name": "another"})) == first
        assert entries(site) == before and "admit is not in the audit log" in caplog.text
        assert (site.site.state / ROOM).stat().st_size == room_of(site)
        assert asked(place, study.changed(study={"name": "third"})) == first
        assert entries(site) == before + 1
