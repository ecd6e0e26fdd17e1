"""A coordinator, or a site, that departs from the protocol: what it tries, and what it gets."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.core.dp.plan import plan_for_site
from fedtune.core.secagg import draw, masks, statement
from fedtune.core.secagg.masks import centre_words
from fedtune.core.secagg.statement import Ready, set_digest
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.keys import SigningKey
from fedtune.server.admission import plan_message
from fedtune.server.orders import tell_finished
from tests.secagg.model import World
from tests.secagg.unit_sites import DIMENSION, DRAW_LIES, LEAST, NAMES, PINNED, SIGMA, SIZES, study

Patch = pytest.MonkeyPatch


def words_of(world: World, ready: Ready) -> Any:
    (sent,) = world.draws[ready.masking].left.values()
    return np.frombuffer(sent[-4 * 8 :], "<u4")


def signed(world: World, name: str, ready: Ready, **changes: Any) -> Ready:
    return replace(ready, **changes).signed(world.sites[name].key)


def charges(world: World, name: str) -> int:
    return len(world.sites[name].ledger.spending())


# ------------------------------------------------------------------- the set is not what it was


def test_a_site_whose_message_is_dropped_is_not_told_apart_by_asking_again(world: World) -> None:
    """Σ{a,b,c,d} - Σ{a,b,c} would be d's sum with d's noise alone."""
    said = world.readied(*PINNED)
    assert world.ask_words("a", said) == "masked"
    assert world.ask_words("a", said[:3]) == "void"
    assert world.ask_words("a", said) == "masked"
    assert world.ask_words("b", said[:3]) == "masked", "what it was asked first"
    assert world.ask_words("b", said) == "void"


def test_sites_that_are_told_different_sets_open_nothing(world: World) -> None:
    said = world.readied(*PINNED)
    assert world.ask_words("a", said) == "masked"
    assert all(world.ask_words(n, said[1:]) == "masked" for n in ("b", "c", "d"))
    exact = sum(world.draws[r.masking].waiting.total for r in said)
    mixed = centre_words(sum(words_of(world, r) for r in said))
    # Eight words of 32 bits: one is as near by chance in 8 of a million runs; opened, all are 0.
    assert np.abs(mixed - exact).min() > 2**11, "a's words open in no sum"
    three = centre_words(sum(words_of(world, r) for r in said[1:]))
    assert (three == exact - world.draws[said[0].masking].waiting.total).all()


@pytest.mark.parametrize("first", [3, 4])
def test_a_restart_does_not_forget_the_set(world: World, first: int) -> None:
    said = world.readied(*PINNED)
    assert world.ask_words("a", said[:first]) == "masked"
    world.restart("a")
    world.prepare("a")
    assert world.ask_words("a", said[: 7 - first]) == "void"


def test_ready_and_masked_answer_again_with_the_same_bytes(world: World) -> None:
    said = world.readied(*PINNED)
    assert world.readied("a") == said[:1]
    assert world.ask_words("a", said) == world.ask_words("a", said) == "masked"
    assert world.readied("a") == said[:1], "still the same statement, from what was sent"
    assert charges(world, "a") == 1
    world.check()


def test_a_restart_between_ready_and_masked_voids_the_attempt(world: World) -> None:
    """The key was in the memory of the process that ended; what comes next is another draw, with
    another key and paid for, in the same attempt or in the next."""
    said = world.readied(*PINNED)
    world.restart("a")
    assert world.ask_words("a", said) == "unprepared"
    world.prepare("a")
    assert world.ask_words("a", said) == "void" and charges(world, "a") == 1
    (again,) = world.readied("a")
    assert again.draw == said[0].draw and again.masking != said[0].masking
    assert charges(world, "a") == 2
    assert world.ask_words("a", said) == "void", "the first draw is gone"
    assert world.ask_words("a", [again, *said[1:]]) == "masked"
    world.check()


def test_a_folder_put_back_masks_no_draw_a_second_time(world: World) -> None:
    """A snapshot of the site's folder, ledger, anchor and key included, from between ready and
    masked: nothing in it could tell that the draw was masked since."""
    said = world.readied(*PINNED)
    world.copy("a")
    assert world.ask_words("a", said) == "masked"
    world.put_back("a")
    world.prepare("a")
    assert world.ask_words("a", said[:3]) == "void"
    assert world.ask_words("a", said) == "void"
    world.check()


def test_a_folder_put_back_under_a_running_client_is_noticed(world: World) -> None:
    """It remembers the head that it wrote: no draw, whether the order brings a receipt or none."""
    world.copy("a")
    world.readied("a")
    world.put_back("a", running=True)
    drawn = len(world.draws)
    assert world.ask_ready("a", 1, 2) == "failed"
    assert len(world.draws) == drawn


def test_a_crash_after_the_words_were_stored_is_made_good(world: World) -> None:
    said = world.readied(*PINNED)
    world.sites["a"].crash = "released"
    assert world.ask_words("a", said) == "failed"
    world.prepare("a")
    assert world.ask_words("a", said) == "masked"


def test_words_of_an_earlier_round_are_kept_no_longer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they come again would tell what space the disk had for them; a simulation's stay."""
    deployed = property(lambda _: False, lambda *_: None)
    monkeypatch.setattr(SiteWorker, "simulated", deployed, raising=False)
    for round_ in (1, 2):
        world.ask_words("a", world.readied("a", "b", "c", round_=round_))
    stored = [path.name for path in (world.sites["a"].ledger.folder / "outbox").glob("*.bin")]
    assert len(stored) == 1 and "-2-" in stored[0]


def test_draws_that_an_earlier_release_kept_on_disk_are_removed(world: World) -> None:
    places = world.home / "a" / draw.FOLDER
    places.mkdir()
    for name in ("0a1b-1-1-0a1b.bin", "0a1b-1-2-0a1b.bin.0a1b.7.new", "notes.bin"):
        (places / name).write_text("a key")
    world.restart("a")
    world.prepare("a")
    assert [path.name for path in places.iterdir()] == ["notes.bin"], "somebody else's"


# --------------------------------------------------------------------------- who is in the set


def test_sybils_of_the_coordinator_count_for_nothing(world: World) -> None:
    said = world.readied(*NAMES)
    a, b, c, _, s = said
    other = SigningKey()
    forged = replace(c, signing=other.public, site="x", masking=masks.public_of(masks.new_key()))
    sybil = replace(forged, signature="").signed(other)
    assert world.ask_words("a", [a, b, s]) == "void"
    assert world.ask_words("a", [a, b, s, sybil]) == "void"
    assert world.ask_words("a", [a, b, c, s, sybil]) == "masked", "as long as three are known"


@pytest.mark.parametrize("how", ["another key", "another's name", "no signature"])
def test_a_forged_statement_is_nobodys(world: World, how: str) -> None:
    a, b, c = world.readied("a", "b", "c")
    forged = {
        "another key": replace(c, signature=SigningKey().sign(b"fedtune ready\0")),
        "another's name": replace(c, site="d"),
        "no signature": replace(c, signature="0" * 128),
    }[how]
    assert world.ask_words("a", [a, b, forged]) == "void"
    assert world.ask_words("a", [a, b, c]) == "masked"


def test_a_peer_of_other_noise_is_no_part_of_the_sum(world: World) -> None:
    """Its share is not what ε counts on, and its grid another: a release that calibrates σ
    otherwise."""
    a, b, c = world.readied("a", "b", "c")
    less = replace(c, noise=c.noise * (1 - 1e-12), signature="").signed(world.sites["c"].key)
    assert world.ask_words("a", [a, b, less]) == "void"
    assert world.ask_words("a", [a, b, c]) == "masked"


def test_a_statement_of_an_earlier_attempt_is_of_another_draw(world: World) -> None:
    old = world.readied("a", "b", "c")
    new = world.readied("a", "b", "c", attempt=2)
    assert not {r.masking for r in old} & {r.masking for r in new}, "new keys"
    assert [charges(world, n) for n in "abc"] == [2, 2, 2], "and paid for again"
    assert world.ask_words("a", [new[0], new[1], old[2]]) == "void"
    assert world.ask_words("a", [new[0], *old[1:]]) == "void"
    assert world.ask_words("a", old) == "void", "given up: its key is gone"
    assert world.ask_words("a", new) == "masked"
    world.check()


def test_an_attempt_that_was_masked_is_no_answer_to_the_next(world: World) -> None:
    said = world.readied("a", "b", "c")
    assert world.ask_words("a", said) == "masked"
    (again,) = world.readied("a", attempt=2)
    assert again.masking != said[0].masking and again.draw.attempt == 2
    assert charges(world, "a") == 2


def test_sites_with_different_adapters_are_in_no_set_together(world: World) -> None:
    a, b, c = world.readied("a", "b", "c")
    (d,) = world.readied("d", value=0.5)
    assert world.ask_words("d", [a, b, c, d], d.draw) == "void"
    assert world.ask_words("a", [a, b, c, d]) == "void"
    assert world.ask_words("a", [a, b, c]) == "masked"


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f"])
def test_a_point_of_low_order_gives_no_mask(world: World, point: str) -> None:
    """A pinned site's, even: the pair's secret would be zero, which everybody knows."""
    a, b, c, d = world.readied(*PINNED)
    low = signed(world, "d", d, masking=point)
    assert world.ask_words("a", [a, b, c, low]) == "void"
    assert world.ask_words("a", [a, b, c]) == "masked"


def test_a_masking_key_of_low_order_costs_nobody_an_attempt(world: World) -> None:
    """The coordinator refuses it at ready; in the set it would void every attempt."""
    world.sites["d"].lie = "a key of low order"
    world.advance(1)
    assert ("d", "dropped", "no secret can be shared with a ready site's masking key") in world.told
    assert world.progress().history[0]["participants"] == ["a", "b", "c", "s"]
    assert [charges(world, n) for n in "abc"] == [1, 1, 1]


@pytest.mark.parametrize("what", ["site", "signing", "masking"])
def test_whoever_is_in_the_set_twice_voids_it(world: World, what: str) -> None:
    a, b, c, d = world.readied(*PINNED)
    if what == "signing":
        fresh = masks.public_of(masks.new_key())
        double = signed(world, "c", c, site="x", masking=fresh)
    else:
        double = signed(world, "d", d, **{what: getattr(c, what)})
    assert world.ask_words("a", [a, b, c, double]) == "void"
    assert world.ask_words("a", [a, b, c, a]) == "void"
    assert world.ask_words("a", [a, b, c]) == "masked"


def test_a_statement_spelled_another_way_is_malformed(world: World) -> None:
    said = world.readied("a", "b", "c")
    texts = [r.text() for r in said]
    other = {
        "a space": texts[2].replace(":", ": ", 1),
        "a field more": texts[2].replace("{", '{"a":1,', 1),
        "a field twice": texts[2].replace("{", '{"size":9,', 1),
        "a float": texts[2].replace(f'"size":{said[2].size}', f'"size":{said[2].size}.0'),
        "capitals": texts[2].replace(said[2].masking, said[2].masking.upper()),
    }
    for how, text in other.items():
        listed = json.dumps([*texts[:2], text])
        assert world.ask_words("a", said, text=listed) == "void", how
    for how in ("", "[]", "null", "[1]", "{}", "[" * 100_000):
        assert world.ask_words("a", said, text=how) == "void", how
    assert world.ask_words("a", said, text=json.dumps(texts)) == "masked"


def test_too_few_pinned_sites_are_refused_before_anything_is_charged(world: World) -> None:
    known, world.keys = world.keys, {n: world.keys[n] for n in ("a", "b", "s")}
    assert world.ask_ready("a", 1, 1) == "void"
    world.keys = known
    assert charges(world, "a") == 0


def test_sites_that_nobody_pinned_cost_a_site_no_more_than_a_bound(
    world: World, monkeypatch: Patch
) -> None:
    """Masks for them are made for a bounded number of numbers together; a pinned site is not
    counted. Twin: without the bound, as many as the coordinator makes up."""
    monkeypatch.setattr(statement, "MOST_NUMBERS", DIMENSION)  # one such site: s
    known, sybil = world.keys, SigningKey()
    world.keys = known | {"x": sybil.public}
    assert world.ask_ready("a", 1, 1) == "void"
    assert charges(world, "a") == 0, "refused before anything is charged"
    world.keys = known
    a, b, c, d, s = world.readied(*NAMES)
    made_up = replace(s, signing=sybil.public, site="x", masking=masks.public_of(masks.new_key()))
    further = replace(made_up, signature="").signed(sybil)
    assert world.ask_words("a", [a, b, c, d, s, further]) == "void"
    assert world.ask_words("a", [a, b, c, d, s]) == "masked"
    monkeypatch.setattr(statement, "MOST_NUMBERS", 2 * DIMENSION)
    assert world.ask_words("b", [a, b, c, d, s, further]) == "masked"


# ----------------------------------------------------------------------- other ways to one site


def test_no_update_of_one_site_is_sent_in_such_a_study(world: World) -> None:
    from flwr.app import ConfigRecord

    from fedtune.core.wire import seal
    from fedtune.core.wire.arrays import bodies
    from fedtune.core.wire.codec import encode
    from fedtune.flower.records import to_record

    adapter = to_record(encode({"u": np.zeros(8, np.float32)}, "float32"))
    beside = seal.digest_beside(bodies(adapter))
    signed = seal.order(world.key, world.study.digest, 1, "nonce", "", beside=beside)
    signed_order = ConfigRecord(signed)
    with world.at_work():
        got = world.network.tell("a", "train", {"order": signed_order, "adapter": adapter})
    assert got == "refused"
    assert charges(world, "a") == 0


@pytest.mark.parametrize(("sites", "colluding"), [(2, 1), (3, 2), (5, 4)])
def test_noise_that_one_site_alone_adds_is_refused(sites: int, colluding: int) -> None:
    with pytest.raises(ValueError, match="min_sites"):
        body = study().model_dump(mode="python")
        body["strategy"]["min_sites"] = sites
        body["secure_aggregation"]["colluding"] = colluding
        type(study()).model_validate(body)


def test_a_ceiling_for_the_fallback_holds(world: World) -> None:
    path = world.home / "a.toml"
    path.write_text(path.read_text().replace("fallback_epsilon = 1e9", "fallback_epsilon = 3"))
    alone = plan_for_site(world.study, SIZES["a"])
    assert alone.epsilon < 3, "under the assumption the study fits"
    assert world.ask_ready("a", 1, 1) == "refused"
    assert charges(world, "a") == 0


# ------------------------------------------------------------------------------ lying sites


@pytest.mark.parametrize("how", ["replay", "another set", "short words"])
def test_a_reply_that_is_dropped_is_asked_for_again(world: World, how: str) -> None:
    """Such as an old message that came once more: what the site says next is in the sum."""
    world.advance(1)
    if how == "replay":
        world.network.faults[world.nodes["a"], "train.masked"] = how
    else:
        world.sites["a"].lie = how
    world.told.clear()
    world.advance(1)
    assert [s for n, s, _ in world.told if n == "a"][-4:] == [
        "ready",
        "dropped",
        "masked",
        "trained",
    ]
    assert [charges(world, n) for n in NAMES] == [2] * len(NAMES)
    world.check()


def test_a_finished_study_leaves_no_key(world: World) -> None:
    """Of an attempt that was given up, and that no later draw followed."""
    said = world.readied("a", "b", "c")
    roster: Any = SimpleNamespace(nodes=world.nodes, grid=world.network, expect=lambda *_: None)
    roster.plan = plan_message(world.study, {}, world.key)
    with world.at_work():
        tell_finished(roster, world.key)
    assert world.sites["a"].draws.find(said[0].draw) is None
    assert world.ask_words("a", said) == "void" and charges(world, "a") == 1


@pytest.mark.parametrize("lie", DRAW_LIES)
def test_the_coordinator_takes_no_statement_but_of_this_draw(world: World, lie: str) -> None:
    world.sites["a"].lie = lie
    world.advance(1)
    assert ("a", "dropped", "its statement is about another draw, or another site") in world.told
    world.check()
    assert "a" not in world.progress().history[0]["participants"]


def test_the_coordinator_takes_no_statement_of_other_noise(world: World) -> None:
    world.sites["a"].lie = "another noise"
    world.advance(1)
    assert any(told[:2] == ("a", "dropped") and "another noise" in told[2] for told in world.told)
    world.check()
    assert "a" not in world.progress().history[0]["participants"]


def test_garbled_words_stop_the_run_and_the_next_attempt_is_a_new_draw(world: World) -> None:
    """A swapped keystream: what is opened is uniform, and nobody can tell whose fault it was."""
    world.sites["a"].lie = "garbled words"
    world.advance(1)
    assert "one of the sites sent something else" in str(world.error)
    kept = world.progress()
    assert kept.round == 0 and kept.attempt["number"] == 2 and not kept.attempt["closed"]
    world.garbled = False
    world.advance()
    assert world.finished, world.error
    world.check()


def test_a_site_that_adds_no_noise_is_noticed_by_nobody_and_t_counts_it(world: World) -> None:
    """That is what t is for: σ is still there with one site's noise missing, not with two."""
    world.noisy["c"] = False
    for name in ("d", "s"):
        world.network.away.add(world.nodes[name])
    world.advance()
    assert world.finished and not world.error
    own = plan_for_site(world.study, 10).own_noise
    assert own * np.sqrt(LEAST - 1) >= SIGMA
    assert own * np.sqrt(LEAST - 2) < 0.8 * SIGMA


def test_more_units_than_declared_do_not_show(world: World) -> None:
    """Even so many that the words wrap: the same bytes, but for the words."""
    seen = []
    for attempt, units in ((1, 1), (2, 10_000_000)):
        world.units["a"] = units
        said = world.readied("a", "b", "c", attempt=attempt)
        assert world.ask_words("a", said) == "masked"
        assert said[0].size == SIZES["a"]
        seen.append((len(words_of(world, said[0])), len(said[0].text())))
    assert seen[0] == seen[1]
    assert np.abs(world.draws[said[0].masking].waiting.total).max() > 2**33


def test_a_set_is_named_by_all_that_its_sites_signed(world: World) -> None:
    said = world.readied("a", "b", "c")
    assert set_digest(said) == set_digest(said[::-1]) != set_digest(said[:2])
    assert set_digest(said) != set_digest([*said[:2], signed(world, "c", said[2], size=9)])
