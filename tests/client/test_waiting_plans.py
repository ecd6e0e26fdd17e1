"""Plans that nobody at a site asked for: what is kept of them, and what they may not take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedtune.core.config import Site, Study, save
from fedtune.core.files.room import ROOM, Room
from fedtune.core.registry import process_cache
from fedtune.core.vault.answers import Place, answer
from fedtune.core.vault.waiting_plans import MOST, MOST_BYTES, keep_plan
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import Request
from fedtune.core.wire.seal import sign_plan
from tests.client.site_kit import begun, make_site, notes, room_of
from tests.disks import disk

KEY = SigningKey()


def a_site(folder: Path, admission: str = "reviewed") -> tuple[Site, Place]:
    notes(folder)
    site, path = make_site(folder, {"admission": admission}, patient="who"), folder / "site.toml"
    save(site, path)
    process_cache.clear("workers")
    return site, Place(str(path))


def asked(place: Place, study: Study) -> tuple[str, str]:
    """The status and the reason that a coordinator gets for its plan."""
    sent = {"study": study.model_dump_json(), "digest": study.digest}
    plan = {**sent, **sign_plan(KEY, study.digest), **version_fields()}
    fields = answer(place, Request("prepare", {"plan": plan})).fields
    return str(fields["status"]), str(fields["reason"])


def kept(site: Site) -> list[Path]:
    return sorted((site.site.state / "plans").glob("*"))


def test_a_plan_of_more_than_a_mebibyte_is_refused_and_not_kept(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twin: one below it waits, and is kept."""
    site, place = a_site(tmp_path)
    study = begun(tiny_base).study
    assert asked(place, study)[0] == "waiting" and len(kept(site)) == 1
    labels = tuple(f"{n}-{'x' * 16_000}" for n in range(MOST_BYTES // 16_000 + 1))
    status, reason = asked(place, study.changed(objective={"labels": labels}))
    assert status == "refused" and "the plan is too large" in reason
    assert len(kept(site)) == 1


def test_plans_that_wait_take_nothing_of_the_ledgers_room(tmp_path: Path, tiny_base: Path) -> None:
    """Whether one was kept is not in the answer. Twin: with space beside the room they are kept."""
    study = begun(tiny_base).study
    with disk(tmp_path / "disk", megabytes=24) as made:
        site, place = a_site(made.path)
        state = site.site.state
        first = asked(place, study)
        room = (state / ROOM).stat().st_size
        assert room == room_of(site) and len(kept(site)) == 1
        with made.with_room_for(100_000):
            for number in range(3):
                labels = tuple(f"{number}-{n}-{'x' * 9_000}" for n in range(40))
                further = study.changed(objective={"labels": labels})
                assert asked(place, further) == first
        assert len(kept(site)) == 1 and (state / ROOM).stat().st_size == room_of(site)
        assert asked(place, study.changed(study={"name": "another"})) == first
        assert len(kept(site)) == 2


def test_the_oldest_go_before_another_is_written(tmp_path: Path, tiny_base: Path) -> None:
    site, _ = a_site(tmp_path)
    study = begun(tiny_base).study
    for number in range(MOST + 3):
        path = keep_plan(site, study.changed(study={"name": f"plan-{number}"}))
        os.utime(path, (number, number))
        assert len(kept(site)) == min(MOST, number + 1)
        oldest = min(kept(site), key=lambda file: file.stat().st_mtime)
    assert oldest.stat().st_mtime == 3


def test_a_plan_that_cannot_be_written_leaves_no_part_of_it(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes the first bytes of a file and not the last, though it said it had space."""
    study = begun(tiny_base).study
    with disk(tmp_path / "disk", megabytes=4) as made:
        site, _ = a_site(made.path)
        assert not SiteWorker(site).home.admitted(study.digest)
        monkeypatch.setattr(Room, "has_space", lambda *_: True)
        with made.with_room_for(3 * 4096):
            labels = tuple(f"{n}-{'x' * 9_000}" for n in range(40))
            keep_plan(site, study.changed(objective={"labels": labels}))
        assert kept(site) == []
