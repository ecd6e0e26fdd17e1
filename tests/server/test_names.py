"""A site's name comes from who its node is, never from a message: no one speaks for another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.config import Study
from fedtune.core.errors import FedtuneError, Refused
from fedtune.core.vault.prepared import Admission
from fedtune.flower.enrol import Member
from fedtune.flower.grid import InProcessGrid
from fedtune.server import store
from tests.server.fakes import FakeSite, Trial, grid_of, make_parts, make_study


class Impostor(FakeSite):
    """Answers every plan in another's name; `says`: as what."""

    says: Admission

    def prepare(self, study: Any, frozen: Any, coordinator: str) -> Admission:
        super().prepare(study, frozen, coordinator)
        return self.says


def impostor(name: str, says: Admission, key: str = "") -> Impostor:
    site = Impostor(name)
    site.says = says
    if key:  # it knows the other's public key, not the private one
        site.key = SimpleNamespace(public=key, sign=site.key.sign)  # type: ignore[assignment]
    return site


def enrolled(run: Trial, **changes: Member) -> Any:
    """The registry as the coordinator knows it: by node, whatever anybody says."""
    known = {node: Member(s.name, s.key.public) for node, s in enumerate(run.sites, 2)}
    for node, s in enumerate(run.sites, 2):
        known[node] = changes.get(s.name, known[node])

    def members(grid: Any) -> Mapping[int, Member]:
        return known

    return members


def missing(run: Trial, out: str = "out") -> dict[str, str]:
    lines = (run.folder / out / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])["missing"]


def went(run: Trial, study: Study | None = None, **options: Any) -> list[list[str]] | str:
    """Who took part in each round; of a run that failed, why."""
    try:
        body = run.run(study or make_study(min_sites=1), **options)
    except FedtuneError as error:
        return str(error)
    return [entry["participants"] for entry in body["rounds"]]


REFUSES = Admission(False, "policy.max_epsilon", "north", 7)
CLAIMS = Admission(True, "", "north", 10**9)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("says", [REFUSES, CLAIMS], ids=["refuses", "claims"])
@pytest.mark.parametrize("vouched", [True, False], ids=["registry", "files"])
def test_nobody_is_thrown_out_or_shadowed_by_another(trial, first, says, vouched):
    north, south = FakeSite("north", size=50), impostor("south", says)
    run = trial(*([south, north] if first else [north, south]))
    parts = make_parts(enrolled=enrolled(run)) if vouched else make_parts()
    assert went(run, parts=parts) == [["north"]] * 4
    assert set(missing(run)) == {"south"}


@pytest.mark.parametrize("answer", ["refused", "unprepared"])
def test_nor_by_one_who_is_asked_again_and_again(trial, answer):
    """Whoever says that it does not know the plan gets it again, and may name the next victim."""
    north, south = FakeSite("north"), FakeSite("south")
    honest = south.prepare

    def prepare(*given: Any) -> Admission:
        said = honest(*given)
        south.known = False
        return REFUSES if south.prepared > 1 else said

    south.prepare = prepare  # type: ignore[method-assign]
    run = trial(north, south)
    assert went(run) == [["north"]] * 4


def test_a_public_key_is_no_proof_and_fixes_nothing_even_over_resume(trial):
    """The impostor knows north's public key (it travels in north.request), comes first, and says
    another size. Then the run goes on, and north comes."""
    north = FakeSite("north", size=50)
    south = impostor("south", CLAIMS, key=north.key.public)
    east = FakeSite("east")
    run = trial(south, north, east)
    study = make_study(min_sites=1)
    late = enrolled(run)
    grid = run.grid()
    everyone = grid.get_node_ids()
    grid.get_node_ids = lambda: [everyone[0], everyone[2]]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run(study, grid=grid, parts=make_parts(enrolled=late), on_event=_stop_after_a_round)
    again = went(run, study, resume=True, parts=make_parts(enrolled=late))
    assert again[-1] == ["east", "north"]
    kept = store.load(run.folder / "out", study)
    assert kept is not None and kept.sizes["north"] == 50


def _stop_after_a_round(kind: str, data: dict[str, Any]) -> None:
    if kind == "round":
        raise KeyboardInterrupt


class Strangers(InProcessGrid):
    """As somebody's own SuperLink: nobody vouches for a node."""

    members = None  # type: ignore[assignment]


@pytest.mark.parametrize("says", [REFUSES, CLAIMS], ids=["refuses", "claims"])
def test_where_nobody_vouches_a_name_is_who_had_it_first(trial, says):
    north, south = FakeSite("north", size=50), impostor("south", says)
    run = trial(north, south)
    grid = grid_of(["north", "south"], Strangers)
    assert went(run, grid=grid) == [["north"]] * 4
    assert set(missing(run)) == {"node 3"}


def test_the_twin_a_site_speaks_for_itself(trial):
    """What an impostor may not say of north, north may: it is refused, by its own words."""
    north, south = FakeSite("north", refusal="policy.max_epsilon"), FakeSite("south")
    run = trial(north, south)
    assert went(run, parts=make_parts(enrolled=enrolled(run))) == [["south"]] * 4
    assert missing(run) == {"north": "refused: policy.max_epsilon"}


def test_a_node_that_no_record_names_takes_no_part(trial):
    run = trial(FakeSite("north"))
    with pytest.raises(Refused, match=r"node 2: .*not enrolled"):
        run.run(make_study(min_sites=1), parts=make_parts(enrolled=lambda grid: {}))
    assert run.sites[0].calls == []


def test_where_nobody_vouches_a_name_keeps_its_key_over_resume(trial):
    north, south = FakeSite("north"), impostor("south", CLAIMS)
    run = trial(north, south)
    study = make_study(min_sites=1)
    grid = grid_of(["north"], Strangers)
    with pytest.raises(KeyboardInterrupt):
        run.run(study, grid=grid, on_event=_stop_after_a_round)
    south.says = Admission(True, "", "north", north.size)
    grid = grid_of(["south", "north"], Strangers)
    assert went(run, study, grid=grid, resume=True) == [["north"]] * 4
