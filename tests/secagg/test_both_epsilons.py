"""Of a study whose sites share noise, every place that shows ε shows two: the one that holds under
the assumption, and the one that holds whatever happens."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtune.accounting import costs
from fedtune.accounting.composed_epsilon import compose_reports
from fedtune.accounting.costs import most_numbers
from fedtune.audit import _plan_one_site
from fedtune.audit.gaussian import one_step
from fedtune.cli.console import closing
from fedtune.cli.ledger_view import ledger_view
from fedtune.cli.verify import _lines
from fedtune.core.config import Study
from fedtune.core.config.site import PolicyTable
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.dp.shared_noise import bits_of
from fedtune.core.errors import BudgetExceeded, NotGenuine
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import budget, facts, study_lines
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.budget import Budget
from fedtune.core.vault.budget_refusal import explain
from fedtune.core.vault.worker import SiteWorker
from fedtune.derive.model_card import privacy_line
from fedtune.evidence import fingerprints
from fedtune.evidence.dossier.content import build
from fedtune.evidence.dossier.facts import documents
from fedtune.evidence.figures import privacy, seals
from fedtune.evidence.verify import verify
from fedtune.launch.simulate import simulate
from fedtune.officer.review import review
from fedtune.public.start import start
from fedtune.report.claim import fallback, shared_line
from tests import chance
from tests.secagg.world import lay_out

KEYS = ("aa" * 32, "bb" * 32)


@pytest.fixture
def study(tmp_path: Path, tiny_base: Path) -> Study:
    return lay_out(tmp_path, tiny_base, epsilon=3.0)[0]


def charge(study: Study, round_: int = 1, attempt: int = 1, **changes: Any) -> Charge:
    plan = plan_for_site(study, 20)
    made = Charge(
        study.digest, "shared", round_, plan.own_noise, plan.sampling_rate, 1, plan.records,
        plan.max_grad_norm, plan.unit, "first", sites=plan.sites, colluding=plan.colluding,
    )  # fmt: skip
    return replace(made, **changes)


def spend(ledger: Ledger, *charges: Charge) -> None:
    ledger.declare("records", [], "sha256:0", [b"ann"])
    for number, one in enumerate(charges):
        ledger.reserve("records", one, f"a:{number}", lambda charges: None)


# ------------------------------------------------------------------------------------------ plan


def test_a_plan_shows_both_the_assumption_and_what_is_gained(study: Study) -> None:
    plan = costs.plan(study, [400])
    (site,) = plan.sites
    assert site.fallback_epsilon is not None and site.own_noise_multiplier is not None
    alone = study.changed(privacy={"epsilon": site.fallback_epsilon}).model_copy(
        update={"secure_aggregation": None}
    )
    # what a study of own noise must spend for as noisy a mean of equal sites
    assert plan_for_site(alone, 400).noise_multiplier == pytest.approx(
        site.own_noise_multiplier, rel=1e-3
    )
    text = "\n".join(costs.shared_lines(study, [400]))
    whatever = rounded_up(site.fallback_epsilon)
    assert "at most 1 of the 3 sites that share the noise colludes with the coordinator" in text
    assert f"learns as if ε = {whatever} without" in text
    assert f"Whatever happens, ε = {whatever} holds" in text
    assert "--set privacy.epsilon=1" in text and "A patient of two of the sites" in text


def test_a_plan_says_what_attempts_that_come_to_nothing_cost(study: Study) -> None:
    """As much as the same rounds and so many more, by the same noise."""
    plan, told = plan_for_site(study, 400), "\n".join(costs.shared_lines(study, [400]))
    for more, words in ((1, "one such attempt"), (2, "two")):
        longer = replace(plan, rounds=plan.rounds + more)
        claimed, whatever = rounded_up(longer.epsilon), rounded_up(longer.fallback_epsilon)
        assert f"ith {words} ε = {claimed} and {whatever} whatever happens" in told


@pytest.mark.parametrize(("ceiling", "room"), [(1.0, "0 attempts"), (1.2, "1 attempt ")])
def test_an_officer_sees_for_how_many_attempts_there_is_room(
    tmp_path: Path, tiny_base: Path, ceiling: float, room: str
) -> None:
    """The ceiling, in multiples of what the plan costs; one round more of two costs a quarter."""
    study, (site, *_) = lay_out(tmp_path, tiny_base, epsilon=3.0)
    most = plan_for_site(study, site.site.declared_size).fallback_epsilon * ceiling
    site = site.with_peers(KEYS).changed(policy={"max_fallback_epsilon": most * 1.1})
    shown = review(study, site, Ledger(site.site.state))
    text = "\n".join(line for _, lines in shown.sections for line in lines)
    assert f"The ceilings leave room for {room}" in text and "2 rounds" in text


def test_at_a_delta_of_a_thousandth_epsilon_one_shared_by_nine_is_three_and_a_half(
    study: Study,
) -> None:
    nine = study.changed(
        strategy={"min_sites": 9}, privacy={"epsilon": 1.0}, training={"rounds": 1}
    )
    assert plan_for_site(nine, 400).fallback_epsilon == pytest.approx(3.5, abs=0.1)
    assert not any("--set privacy.epsilon=1" in line for line in costs.shared_lines(nine, [400]))


def test_a_study_of_own_noise_says_nothing_of_it(study: Study) -> None:
    own = study.model_copy(update={"secure_aggregation": None})
    (site,) = costs.plan(own, [400]).sites
    assert (site.fallback_epsilon, site.own_noise_multiplier) == (None, None)
    assert costs.shared_lines(own, [400]) == []


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_a_patient_of_two_sites_does_worse_than_adding_up(
    tmp_path: Path, tiny_base: Path, rate: float
) -> None:
    study = lay_out(tmp_path, tiny_base, epsilon=3.0, rate=rate)[0]
    study = study.changed(privacy={"epsilon": None, "noise_multiplier": 2.0})
    plan = plan_for_site(study, 400)
    shared, own = costs._of_two(plan, shared=True), costs._of_two(plan, shared=False)
    assert shared > own > plan.epsilon
    if rate == 1:  # both sites' rows in one sum: twice the sensitivity
        half = Steps(plan.noise_multiplier / 2, 1.0, plan.steps, 1)
        assert shared == pytest.approx(accountant.epsilon([half], plan.delta), rel=1e-3)


def test_words_are_as_narrow_as_the_adapter_lets_them_be(study: Study) -> None:
    sigma, sizes = plan_for_site(study, 400).noise_multiplier, [400, 400, 400]
    most = most_numbers(study, sigma, sizes)
    assert (bits_of(study, sigma, sizes, most), bits_of(study, sigma, sizes, most + 1)) == (32, 64)
    assert most_numbers(study, sigma, [10**7] * 3) == 0


# ---------------------------------------------------------------------------------------- review


def test_an_officer_sees_both_totals_and_every_fingerprint_to_compare(
    tmp_path: Path, tiny_base: Path
) -> None:
    study, (site, *_) = lay_out(tmp_path, tiny_base, epsilon=3.0)
    site, ledger = site.with_peers(KEYS), Ledger(site.site.state)
    shown = review(study, site, ledger)
    text = "\n".join(line for _, lines in shown.sections for line in lines)
    for key in (ledger.key.public, *KEYS):
        assert f"{key}, fingerprint {fingerprints.of_peer(key)}" in text
    plan = plan_for_site(study, site.site.declared_size)
    assert f"ε = 0 so far, {rounded_up(plan.fallback_epsilon)} with this study" in text
    assert "policy.max_fallback_epsilon, is 100" in text and "masked words" in text
    assert f"noise of {plan.own_noise:g} times that" in text
    lacking = review(study, site.with_peers(KEYS[:1]), ledger)
    assert any("policy.peers lists 1 sites" in refusal for refusal in lacking.refusals)


def test_a_sites_own_key_is_none_of_its_peers(tmp_path: Path, tiny_base: Path) -> None:
    """Else the plan is admitted, and every draw is void: a draw counts this site once. Twin: the
    key of another site more."""
    study, (site, *_) = lay_out(tmp_path, tiny_base, epsilon=3.0)
    made, ledger = start(study), Ledger(site.site.state)
    site = site.changed(policy={"bases": "any"})

    def refused(*keys: str) -> tuple[str, list[str]]:
        here = site.with_peers(keys)
        reason = SiteWorker(here).prepare(made.study, made.frozen).reason
        return reason, review(made.study, here, ledger).refusals

    reason, shown = refused(ledger.key.public, KEYS[0])
    assert "policy.peers lists 1 sites besides this one" in reason
    assert any("policy.peers lists 1 sites besides this one" in line for line in shown)
    for keys in (KEYS, (ledger.key.public, *KEYS)):
        assert refused(*keys) == ("", [])


def test_a_fingerprint_is_of_the_key_and_of_its_purpose() -> None:
    first, second = map(fingerprints.of_peer, KEYS)
    assert first != second and not fingerprints.match_fingerprints(
        first, fingerprints.of_approver(KEYS[0])
    )
    assert fingerprints.match_fingerprints(first, first.replace(" ", "-").upper())


# ------------------------------------------------------------------------- ledger and the ceiling


def test_the_ledger_shows_both_totals_and_void_attempts_in_both(
    tmp_path: Path, study: Study
) -> None:
    ledger = Ledger(tmp_path / "state")
    spend(ledger, charge(study), charge(study), charge(study, 2))  # round 1 twice: one was void
    (line,) = study_lines(ledger.spending("records"), 1e-3)
    plan = plan_for_site(study, 20)
    assert (line.rounds, line.charged) == (2, 3)
    assert line.epsilon == pytest.approx(accountant.epsilon(plan.events(3), 1e-3))
    assert line.fallback == pytest.approx(accountant.epsilon(plan.fallback_events(3), 1e-3))
    policy = PolicyTable(max_epsilon=7.0, max_fallback_epsilon=20.0)
    total = facts(ledger, "records", policy)["budget"]
    assert total["fallback"] > total["epsilon"] > 3
    assert total["fallback_remaining"] == pytest.approx(20.0 - total["fallback"])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ledger_view(ledger, "records", policy))
    text = console.export_text()
    assert rounded_up(total["fallback"]) in text and "policy.max_fallback_epsilon" in text
    json.dumps(total)


def test_a_ledger_of_own_noise_has_one_total(tmp_path: Path, study: Study) -> None:
    ledger = Ledger(tmp_path / "state")
    spend(ledger, charge(study, sites=1, colluding=0))
    total = budget("records", ledger.spending("records"), PolicyTable())
    assert (total.fallback, total.fallback_remaining) == (None, None)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ledger_view(ledger, "records", PolicyTable()))
    assert "whatever" not in console.export_text()


def test_own_noise_counts_alike_in_both_totals(tmp_path: Path, study: Study) -> None:
    ledger = Ledger(tmp_path / "state")
    own = replace(charge(study, sites=1, colluding=0), study="sha256:" + "1" * 64)
    spend(ledger, own, charge(study))
    total = budget("records", ledger.spending("records"), PolicyTable())
    events = [own.fallback, charge(study).fallback]
    assert total.fallback == pytest.approx(accountant.epsilon(events, 1e-3))


def refused(folder: Path, base: Path, ceiling: float) -> str:
    study, (site, *_) = lay_out(folder, base, epsilon=3.0)
    policy = site.policy.model_copy(update={"max_fallback_epsilon": ceiling})
    site = site.model_copy(update={"policy": policy})
    plan = plan_for_site(study, site.site.declared_size)
    ledger = Ledger(site.site.state)
    try:
        Budget(site.policy, plan, []).check()
    except BudgetExceeded as error:
        spend(ledger, charge(study))
        return f"{error} | {'; '.join(explain(study, site, ledger))}"
    return ""


def test_a_budget_for_the_worst_refuses_and_says_what_fits(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(tmp_path, tiny_base, 4.0)
    assert "policy.max_fallback_epsilon" in said and "whatever happens ε = " in said
    assert "what fits: privacy.epsilon up to" in said
    assert refused(tmp_path / "wide", tiny_base, 5.0) == ""
    # Twin: whoever takes the assumption's total for the worst one refuses nothing.
    monkeypatch.setattr(Budget, "fallback", Budget.total)
    assert refused(tmp_path / "twin", tiny_base, 4.0) == ""


# ------------------------------------------------------------------------ what a run says of itself


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A run of three sites at ε = 3."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        study, sites = lay_out(folder, tiny_base, epsilon=3.0, rounds=1)
        simulate(study, sites, folder / "run")
    return folder / "run"


def whatever_of(run: Path) -> tuple[dict[str, Any], str]:
    report = json.loads((run / "report.json").read_text())
    held = fallback(report["privacy"])
    assert held is not None and held["epsilon"] > report["privacy"]["epsilon"]
    return report, f"ε = {rounded_up(held['epsilon'])}"


def test_report_card_closing_line_and_proof_show_both(ran: Path) -> None:
    report, whatever = whatever_of(ran)
    assumed = "at most 1 of the 3 sites that share the noise colludes with the coordinator"
    text = (ran / "report.md").read_text()
    assert f"It holds if {assumed}" in text and f"{whatever} holds" in text
    assert "worse, since all of the patient's records move one sum" in text
    card = privacy_line(report)
    assert assumed in card and whatever in card
    console = Console(width=200, record=True, file=io.StringIO())
    closing(console, ran, report)
    shown = console.export_text()
    assert assumed in shown and whatever in shown
    found = verify(ran)
    assert found.assumption == assumed and f"ε = {rounded_up(found.fallback)}" == whatever
    proof = " ".join(_lines(found).split())
    assert assumed in proof and whatever in proof


def test_a_report_that_understates_the_worst_is_not_genuine(ran: Path, tmp_path: Path) -> None:
    report, _ = whatever_of(ran)
    study, content = load_plan(ran), json.loads((ran / "evidence.json").read_text())
    events = seals(ran, content, study, "", False)
    proven = privacy(ran, study, report, content["sites"], events)
    assert proven["fallback"] == fallback(report["privacy"])["epsilon"]  # type: ignore[index]
    for table in (report["privacy"], report["privacy"]["sites"]["north"]):
        honest = dict(table["secure_aggregation"])
        for lie in ({"fallback_epsilon": 1.0}, {"sites": 9}, {"colluding": 2}):
            table["secure_aggregation"] = honest | lie
            with pytest.raises(NotGenuine):
                privacy(ran, study, report, content["sites"], events)
        table["secure_aggregation"] = honest


def test_a_dossier_shows_both_with_their_sources(ran: Path) -> None:
    _, whatever = whatever_of(ran)
    shown = {one["label"]: one["fact"] for one in blocks(documents(ran)) if one["kind"] == "fact"}
    held = shown["ε whatever happens, by each site's own noise alone, rounded up"]
    assert f"ε = {held['shown']}" == whatever and held["source"] == "report.json#/privacy"
    assert shown["that ε holds if"]["shown"].startswith("at most 1 of the 3 sites")


def blocks(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for section in build(found, {})["sections"] for block in section["blocks"]]


def test_of_a_merged_run_both_are_composed(ran: Path) -> None:
    report, _ = whatever_of(ran)
    plain = json.loads(json.dumps(report))
    for table in (plain["privacy"], *plain["privacy"]["sites"].values()):
        del table["secure_aggregation"]
    for parents, pairs in (([report, report], [[3, 1]]), ([report, plain], [[3, 1]])):
        both = compose_reports(parents)
        site = both["sites"]["north"]
        delta, claimed = both["delta"], report["privacy"]["noise_multiplier"]
        own = report["privacy"]["sites"]["north"]["secure_aggregation"]["own_noise_multiplier"]
        second = own if parents[1] is report else claimed
        expected = accountant.epsilon([Steps(own, 1.0, 1), Steps(second, 1.0, 1)], delta)
        assert site["secure_aggregation"]["assumptions"] == pairs
        assert site["secure_aggregation"]["fallback_epsilon"] == pytest.approx(expected)
        assert site["epsilon"] == pytest.approx(accountant.epsilon([Steps(claimed, 1.0, 2)], delta))
        again = compose_reports(
            [both | {"privacy": both}, plain]
        )  # of a run that was merged itself
        assert again["secure_aggregation"]["fallback_epsilon"] > expected
        assert shared_line(both).startswith("if at most 1 of the 3 sites")
    assert "secure_aggregation" not in compose_reports([plain, plain])


# ------------------------------------------------------------------------------------------ audit


def test_an_audit_of_the_opened_sum_and_of_one_site_alone(study: Study) -> None:
    plan = plan_for_site(study.changed(training={"rounds": 1}), 100)
    claims = (plan.epsilon, plan.fallback_epsilon)
    shared, own = (chance.mu_at(claim, plan.delta) for claim in claims)
    near = chance.mu_at(0.7 * plan.epsilon, plan.delta)
    trials = chance.audit_for(shared, reach=near), chance.audit_for(own, reach=shared)
    opened, alone = one_step(plan, trials[0]), one_step(_plan_one_site(plan), trials[1])
    assert opened.passed and alone.passed
    assert opened.claimed < alone.claimed == pytest.approx(plan.fallback_epsilon)
    assert opened.audited > 0.7 * opened.claimed and alone.audited > opened.claimed
    # Twin: sites that divide their noise by all n, as if nobody colluded, do not hold the claim.
    less = math.sqrt(2 / 3)
    broken = replace(plan, noise_multiplier=plan.noise_multiplier * less)
    enough = chance.audit_for(shared, chance.errors_of(shared / less))
    assert one_step(broken, enough).ceiling > opened.claimed
