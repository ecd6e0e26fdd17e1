"""A refused budget: what was spent, by which study, where its run lies, and what would fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedtune.core.config import Site, load_site, load_study
from fedtune.core.errors import Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.budget_refusal import PLACES, explain, fits, is_within
from fedtune.launch.simulate import simulate
from tests.cli_kit import run

pytestmark = pytest.mark.usefixtures("without_self_test")


@pytest.fixture
def spent(study: Path) -> Path:
    """A study whose two sites have spent most of their budget on another."""
    simulate(load_study(study, settings=["privacy.epsilon=6"]), sites(), "runs/first")
    return study


def sites() -> list[Site]:
    return [load_site(f"{name}/site.toml") for name in ("north", "south")]


def test_a_refusal_says_by_what_where_and_what_fits(spent: Path) -> None:
    site = load_site("north/site.toml")
    again = load_study(spent, settings=["privacy.epsilon=7"])
    paid, by, fitting = explain(again, site, Ledger(site.site.state))
    assert re.fullmatch(r"dataset 'records' has paid ε = [\d.]+ \(at δ = 0.002\) of 8", paid)
    assert re.match(r"tiny \([0-9a-f]{8}, [\d-]{10}\): ε = [\d.]+ alone, in ", by)
    assert by.endswith(f"in {Path('runs/first').absolute()}")
    (most,) = re.findall(r"--set privacy\.epsilon=([\d.]+)", fitting)
    more = load_study(spent, settings=[f"privacy.epsilon={float(most) + 0.1}"])
    assert 0 < float(most) < 7 and not is_within(
        more, site, Ledger(site.site.state).charges("records")
    )
    fitting = load_study(spent, settings=[f"privacy.epsilon={most}"])
    done = simulate(fitting, sites(), "runs/second")
    assert done.report["privacy"]["epsilon"] <= float(most)


def test_the_commands_refusal_has_it_and_the_message_to_the_coordinator_has_not(
    spent: Path,
) -> None:
    refused = run("simulate", spent, "--set", "training.learning_rate=0.7", "--out", "other")
    assert refused.exit_code == 3
    line, *notes = refused.stderr.splitlines()
    assert len(line) < 500 and "has paid" not in line  # the rule, and what to do
    assert line.count("`fedtune tune`") == 1
    told = "\n".join(notes)
    for name in ("north", "south"):
        assert re.search(rf"^  {name}: dataset 'records' has paid ε = ", told, re.MULTILINE)
    assert len(re.findall(r"^    tiny \(.*runs/first$", told, re.MULTILINE)) == 2
    for log in (Path("other/log.jsonl"), Path("north/state/log.jsonl")):
        assert not log.exists() or "has paid" not in log.read_text()
    sent = re.search(r"\(north, south: (refused: .*)\)", line)
    assert sent and "first" not in sent[1]


def test_where_sigma_is_given_rounds_are_searched(study: Path) -> None:
    text = study.read_text().replace("epsilon = 8\n", "noise_multiplier = 2.0\n")
    study.write_text(text.replace("rounds = 2", "rounds = 60"))
    site = load_site("north/site.toml")
    said = fits(load_study(study), site, [])
    (most,) = re.findall(r"--set training\.rounds=(\d+)", said)
    assert 0 < int(most) < 60


def test_nothing_fits_where_nothing_is_left(study: Path) -> None:
    path = Path("north/site.toml")
    path.write_text(path.read_text().replace("max_epsilon = 8", "max_epsilon = 0.001"))
    site = load_site(path)
    assert fits(load_study(study), site, []) == ""
    assert explain(load_study(study), site, Ledger(site.site.state))[-1].endswith(
        "nothing of this study"
    )


def test_a_damaged_note_of_places_is_no_error(spent: Path) -> None:
    site = load_site("north/site.toml")
    assert list(json.loads((site.site.state / PLACES).read_text()).values())
    (site.site.state / PLACES).write_text("[")
    assert "has paid" in explain(load_study(spent), site, Ledger(site.site.state))[0]


def test_a_refusal_that_no_budget_made_is_as_it_was(study: Path) -> None:
    path = Path("north/site.toml")
    path.write_text(path.read_text() + "max_rank = 1\n")
    with pytest.raises(Refused) as refused:
        simulate(load_study(study, settings=["strategy.min_sites=2"]), sites(), "runs/a")
    assert "max_rank" in str(refused.value) and "has paid" not in str(refused.value)
