"""What `fedtune verify` says of sites that took part in an unusual way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.verify import _compare_with
from fedtune.core.config import load_site
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.errors import InfrastructureError, NotGenuine, Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.declared import declare
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.keys import canonical
from fedtune.evidence.sign import EVIDENCE
from fedtune.evidence.verify import verify
from fedtune.officer.claims import compare
from tests.cli_kit import run as command
from tests.guarantee.world import NAMES, patients
from tests.guarantee.world import lay_out as lay_out_sites
from tests.guarantee.world import run as run_study
from tests.private_evaluation_kit import world
from tests.simulated import simulate


def test_a_site_that_only_answered_queries_is_listed_as_absent(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainings failed for want of space, and its evaluations did not."""
    study = world(tmp_path, tiny_base, 3.0)
    for kind in ("site-{}.toml", "{}.jsonl", "held-{}.jsonl"):
        text = (tmp_path / kind.format("south")).read_text()
        (tmp_path / kind.format("west")).write_text(text.replace("south", "west"))
    train = SiteWorker.train

    def fail_at_west(self: SiteWorker, *arguments: Any, **options: Any) -> Any:
        if self.site.site.name == "west":
            raise InfrastructureError("the disk is full", "space")
        return train(self, *arguments, **options)

    monkeypatch.setattr(SiteWorker, "train", fail_at_west)
    simulate(study, sorted(tmp_path.glob("site-*.toml")), tmp_path / "run")
    try:
        found = verify(tmp_path / "run")
    except NotGenuine as error:
        pytest.fail(f"an honest run is refused: {error}")
    assert sorted(found.sites) == ["north", "south"]
    assert sorted(found.absent) == ["west"]
    assert sorted(found.absent["west"]) == ["answers_epsilon", "rounds"]
    assert found.absent["west"]["rounds"] == 3
    answers = epsilon([Steps(3.0, 1.0, 1, 1)], 1e-3)
    assert found.absent["west"]["answers_epsilon"] >= answers > 0


def test_a_site_finds_that_its_paid_answers_were_left_out(tmp_path: Path, tiny_base: Path) -> None:
    """A run without them states that patients of its held-out records paid nothing. Twins: the run
    as it is, and one with an answer that the site's ledger did not release."""
    run, path = tmp_path / "run", tmp_path / "site-north.toml"
    simulate(world(tmp_path, tiny_base, 3.0), sorted(tmp_path.glob("site-*.toml")), run)
    told = command("verify", run, "--own", path, "--simulation")
    assert told.exit_code == 0 and "north, 3 rounds" in told.output, told.output
    site, found = load_site(path), verify(run)
    content = json.loads((run / EVIDENCE).read_text())
    north = [e for e in content["updates"] if (e["kind"], e["site"]) == ("answer", "north")]
    assert [answer["round"] for answer in north] == [2, 3]
    more = content["updates"] + [north[0] | {"round": 1}]
    less = [each for each in content["updates"] if each is not north[1]]
    (run / EVIDENCE).write_bytes(canonical(content | {"updates": less}))
    assert compare(site, run, found).unanswered == [3]
    with pytest.raises(
        Refused, match="lacks what this site released to the queries after rounds 3"
    ):
        _compare_with(path, run, found, quiet=True)
    (run / EVIDENCE).write_bytes(canonical(content | {"updates": more}))
    with pytest.raises(NotGenuine, match="holds this site's answer of round 1"):
        compare(site, run, found)


def test_a_site_is_told_what_shared_noise_cost_it_whatever_happens(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twin: without shared noise there is one ε."""
    study = lay_out_sites(tmp_path, tiny_base, patients(12))
    run_study(study)
    path = study.parent / f"site-{NAMES[0]}.toml"
    site, run = load_site(path), study.parent / "run"
    told = command("verify", run, "--own", path, "--simulation")
    assert told.exit_code == 0 and "whatever happens" not in told.output
    ledger = Ledger(site.home)
    (spent,) = (s for s in ledger.spending() if s.charge.round == 2)
    shared = replace(spent.charge, sites=4, colluding=1)
    ledger.release(ledger.reserve(spent.dataset, shared, "another", lambda _: None), b"an update")
    told = command("verify", run, "--own", path, "--simulation")
    charged = [each.charge for each in ledger.spending()]
    whatever = epsilon([charge.fallback for charge in charged], load_plan(run).privacy.delta)
    assert f"({rounded_up(whatever)} whatever happens)" in told.output, told.output


def test_a_site_whose_data_is_declared_compares_the_runs_own_ledger(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out_sites(tmp_path, tiny_base, patients(12))
    for name in NAMES:
        path = study.parent / f"site-{name}.toml"
        text = path.read_text().replace("[data]\n", '[data]\ndeclared = "generated"\n')
        path.write_text(text.replace("[policy]\n", "[policy]\nallow_declared_data = true\n"))
        declare(load_site(path))
    run_study(study)
    site = study.parent / f"site-{NAMES[0]}.toml"
    told = command("verify", study.parent / "run", "--own", site, "--simulation")
    assert told.exit_code == 0, told.output
    assert f"as {NAMES[0]}, 3 rounds, as its own ledger has them" in told.output


@pytest.mark.parametrize("released", [True, False])
def test_a_round_that_a_site_released_twice_is_named_and_nobody_is_accused(
    tmp_path: Path, tiny_base: Path, released: bool
) -> None:
    """A coordinator that went on from a backup asks again, too. A charge without an answer, as
    after a crash, is not named."""
    study = lay_out_sites(tmp_path, tiny_base, patients(12))
    run_study(study)
    path = study.parent / f"site-{NAMES[0]}.toml"
    site = load_site(path)
    ledger = Ledger(site.home)
    (spent,) = (s for s in ledger.spending() if s.charge.round == 2)
    number = ledger.reserve(spent.dataset, spent.charge, "another", lambda charges: None)
    if released:
        ledger.release(number, b"another answer")
    told = command("verify", study.parent / "run", "--own", path, "--simulation")
    assert told.exit_code == 0, told.output
    text = "charged and released more than once: round 2 (2 answers);"
    assert (text in told.output) is released
