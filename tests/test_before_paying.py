"""What a study may gain is foretold before anything is paid, from public things alone."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import load_study
from fedtune.core.errors import ConfigError
from fedtune.evaluation.before_paying import forecast_and_describe, sites_of
from fedtune.evaluation.expected_gain import (
    DRAWS,
    LEAST,
    Draws,
    Interval,
    Sites,
    World,
    expected_gain,
    worth_from,
)
from fedtune.officer.site_files import sites_in
from fedtune.public.start import start
from fedtune.strategies._posterior import (
    WEIGHT,
    Noised,
    choose,
    features,
    head,
    held_out_hits,
    summarise_public,
)
from tests.simulated import simulate
from tests.strategies.test_posterior import CLASSES, DIRECTIONS, MISSING, release, right
from tests.strategies.test_posterior import World as Truth
from tests.test_cli import run
from tests.test_prototypes import PRIVATE, lay_out


def known(
    records: int = 40, classes: int = CLASSES, shares: dict[int, float] | None = None, seed: int = 0
) -> World:
    """What so many public records say of the classes of a world that is known."""
    truth = Truth(seed)
    vectors, labels = truth.records(records, classes)
    basis = choose(vectors, truth.names, DIRECTIONS, WEIGHT)
    said = summarise_public(basis, vectors, labels, CLASSES, truth.names)
    hits = held_out_hits(basis, vectors, labels, said, truth.names)
    assert hits is not None
    return World(basis, said, hits[0] / hits[1], shares or {})


def sites(units: int, sigma: float = 1.0, count: int = 3) -> Sites:
    return Sites((units,) * count, sigma, count)


def really(sigma: float, units: int, seed: int) -> float:
    """The gain of a real release over the public start, on many records."""
    truth = Truth(seed)
    vectors, labels = truth.records(40)
    basis = choose(vectors, truth.names, DIRECTIONS, WEIGHT)
    said = summarise_public(basis, vectors, labels, CLASSES, truth.names)
    deviation = sigma * np.sqrt(3) * basis.norm
    fitted = head(release(basis, *truth.records(3 * units), deviation, seed), basis, said)
    start = head(Noised(np.zeros((CLASSES, 1)), 1e9, 1), replace(basis, released=0), said)
    judges = truth.records(2000)
    return float((right(fitted, *judges) - right(start, *judges)).mean())


def inside(sigma: float, units: int) -> int:
    """In how many of eight worlds the found gain lies in its interval."""
    count = 0
    for seed in range(8):
        world = known(seed=seed)
        told = world.interval(world.draw(sites(units, sigma), 30).gains)
        count += told.low <= really(sigma, units, seed) <= told.high
    return count


def test_the_gain_that_is_found_lies_where_it_was_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inside(20.0, 60) >= 6
    # Twin: a forecast that forgets the noise.
    draw = World.draw
    monkeypatch.setattr(World, "draw", lambda w, s, n: draw(w, replace(s, sigma=0.0), n))
    assert inside(20.0, 60) <= 3


@pytest.mark.long
def test_more_units_less_noise_and_shared_noise_are_worth_more() -> None:
    world = known()
    mean = lambda s: float(world.draw(s, 20).gains.mean())  # noqa: E731
    little, much = mean(sites(30, 3.0)), mean(sites(300, 3.0))
    assert little < much and mean(sites(30, 1.0)) > little
    told = expected_gain(world, sites(30, 3.0), list("abcdef"))
    assert told.shared and told.shared.mean > told.gain.mean
    least = worth_from(world, sites(30, 3.0))
    assert least and world.interval(world.draw(sites(2 * least, 3.0), 30).gains).low > 0
    assert world.draw(sites(30), 5).gains.tolist() == known().draw(sites(30), 5).gains.tolist()
    assert worth_from(world, sites(30, 1e6)) is None
    assert told.shared and expected_gain(world, sites(30, 3.0, 2), list("abcdef")).shared is None
    sure = expected_gain(world, sites(2 * least, 3.0), list("abcdef"))
    assert sure.is_sure and sure.worth_from and sure.worth_from <= 2 * least


def test_a_class_that_public_records_lack_counts_by_its_declared_share_alone() -> None:
    without, declared = known(classes=MISSING), known(classes=MISSING, shares={MISSING: 0.3})
    assert without.unknown == [MISSING] and declared.unknown == []
    few = without.draw(sites(100, 0.5), 20).gains.mean()
    assert declared.draw(sites(100, 0.5), 20).gains.mean() > few + 0.03


def test_a_forecast_that_hangs_on_names_is_twice_as_wide() -> None:
    """Twins: with a public record of each class, and with a small share."""
    gains = np.linspace(-0.1, 0.3, 41)
    plain = Interval(0.1, -0.08, 0.28)
    for world, told in (
        (known(), plain),
        (known(classes=MISSING, shares={MISSING: 0.05}), plain),
        (known(classes=MISSING, shares={MISSING: 0.3}), Interval(0.1, -0.26, 0.46)),
    ):
        found = world.interval(gains)
        assert astuple(found) == pytest.approx(astuple(told))
        assert bool(world.rough) == (told != plain)
    declared = expected_gain(world, sites(30, 3.0), list("abcdef"))
    assert "twice as wide" in " ".join(declared.lines())


def test_no_gain_is_none_unless_something_is_unknown() -> None:
    nothing = expected_gain(known(400), sites(5, 1000.0), list("abcdef"))
    assert nothing.is_none and nothing.gain.high < LEAST and nothing.worth_from != 5
    assert "NOT WORTH" in nothing.warning and nothing.lines()[-1] == nothing.warning
    unsure = replace(nothing, unknown=("rash",))
    assert not unsure.is_none and "cannot say" in unsure.lines()[-1]
    maybe = replace(nothing, gain=Interval(0.01, -0.01, 0.03))
    assert not maybe.is_none and "may be that nothing" in maybe.warning
    assert not replace(nothing, gain=Interval(0.03, 0.01, 0.05)).warning


def test_few_records_show_less() -> None:
    world = known()
    drawn = world.draw(sites(100), DRAWS)
    few, many = world.interval(drawn.draw_gains(20)), world.interval(drawn.gains)
    assert few.high - few.low > 2 * (many.high - many.low)
    assert isinstance(drawn, Draws)


def test_held_out_records_are_judged_by_what_the_others_say() -> None:
    truth = Truth()
    vectors, labels = truth.records(60)
    basis = choose(vectors, truth.names, DIRECTIONS, WEIGHT)
    said = summarise_public(basis, vectors, labels, CLASSES, truth.names)
    hits = held_out_hits(basis, vectors, labels, said, truth.names)
    assert hits is not None and hits[1] == 60
    shuffled = np.random.default_rng(3).permutation(labels)
    guessed = held_out_hits(basis, vectors, shuffled, said, None)
    assert guessed is not None and guessed[0] < 25 < hits[0]
    assert held_out_hits(basis, vectors, np.full(60, -1), said, None) is None
    assert features(basis, vectors).shape == (60, DIRECTIONS)


def test_noise_and_sites_follow_the_plan(tmp_path: Path, tiny_encoder: Path) -> None:
    own = load_study(lay_out(tmp_path, tiny_encoder, PRIVATE))
    alone = sites_of(own, [12])
    assert alone.sizes == (12, 12, 12) and alone.doses == 3
    (tmp_path / "shared").mkdir()
    table = "[secure_aggregation]\ncolluding = 1\n"
    shared = load_study(lay_out(tmp_path / "shared", tiny_encoder, PRIVATE, more=table))
    assert sites_of(shared, [12, 12, 12]).doses == pytest.approx(1.5)
    assert sites_of(shared, [12]).sigma == pytest.approx(alone.sigma, rel=1e-6)


def test_a_run_says_it_first_and_its_report_has_it(tmp_path: Path, tiny_encoder: Path) -> None:
    path = lay_out(tmp_path, tiny_encoder, PRIVATE.replace("8.0", "95.0"))
    told, lines = forecast_and_describe(load_study(path), [12, 12, 12])
    assert told and told.unknown == ("rash",) and told.records == 12
    assert "cannot say" in lines[-1] and not told.is_none
    said: list[str] = []

    def hear(kind: str, facts: dict[str, Any]) -> None:
        if kind == "records":
            said.append(str(facts["text"]))

    report = simulate(path, sites_in(tmp_path), tmp_path / "run", on_event=hear)
    assert report["quality"]["expected"] == told.as_dict()
    assert all(any(line in text for text in said) for line in lines)


def test_what_is_not_worth_its_price_is_refused_unless_somebody_insists(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    path = lay_out(tmp_path, tiny_encoder, PRIVATE.replace("8.0", "0.001"))
    shares = {"rash": 0.01}
    with pytest.raises(ConfigError, match="--anyway"):
        simulate(path, sites_in(tmp_path), tmp_path / "run", shares=shares)
    assert not (tmp_path / "run" / "plan.json").exists()
    report = simulate(path, sites_in(tmp_path), tmp_path / "run", shares=shares, anyway=True)
    assert report["quality"]["expected"]["gain"]["high"] < LEAST
    with pytest.raises(ConfigError, match="not a class"):
        forecast_and_describe(load_study(path), [12], {"fevers": 0.1})
    with pytest.raises(ConfigError, match="above 0"):
        forecast_and_describe(load_study(path), [12], {"rash": 1.5})


def test_a_review_says_it_or_who_does(tmp_path: Path, tiny_encoder: Path) -> None:
    """Of a study.toml, whose public files are at hand, where they are to be read anyway; of a plan
    as it was sent who makes the forecast, since the paths in it are not this machine's."""
    path = lay_out(tmp_path, tiny_encoder, PRIVATE.replace("8.0", "95.0"))
    at_hand = run("review", path, "--site", tmp_path / "a.toml", "--digest", "--json")
    told, _ = forecast_and_describe(load_study(path), [12])
    assert told and json.loads(at_hand.stdout)["expected"] == json.loads(json.dumps(told.as_dict()))
    (tmp_path / "plan.json").write_text(start(load_study(path)).study.model_dump_json())
    for plan in (path, tmp_path / "plan.json"):
        said = run("review", plan, "--site", tmp_path / "a.toml")
        assert "ask the coordinator what `fedtune plan` says" in " ".join(said.output.split())
    other = (
        path.read_text().replace('"discriminant"', '"fedavg"').replace('"prototypes"', '"classify"')
    )
    path.write_text("\n".join(line for line in other.splitlines() if "options" not in line))
    said = run("review", path, "--site", tmp_path / "a.toml")
    assert "trains by gradients" in " ".join(said.output.split())


def test_what_cannot_be_foretold_says_so(tmp_path: Path, tiny_encoder: Path) -> None:
    path = lay_out(tmp_path, tiny_encoder, PRIVATE)
    text = (
        path.read_text().replace('"prototypes"', '"classify"').replace('"discriminant"', '"fedavg"')
    )
    path.write_text("\n".join(line for line in text.splitlines() if "options" not in line))
    found, lines = forecast_and_describe(load_study(path), [12])
    assert found is None and "cannot be forecast" in lines[0] and "gradients" in lines[0]
    (tmp_path / "off").mkdir()
    assert forecast_and_describe(load_study(lay_out(tmp_path / "off", tiny_encoder)), [12]) == (
        None,
        [],
    )
