"""What another distribution brings runs at a site only where the site's policy names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedtune.core.config import Study, load_study
from fedtune.core.errors import ConfigError, FedtuneError, PolicyRefused
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.strategy import STRATEGIES
from fedtune.core.vault import policy
from fedtune.core.vault.worker import SiteWorker
from fedtune.officer import review
from fedtune.officer.review import read_plan
from tests.client.test_site import begun, make_site, notes
from tests.plugins import install

MODULE = "somebody_elses"
CODE = """
from dataclasses import dataclass
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Half(CausalLM):
    factor: float = 0.5

    def losses(self, network, batch):
        return self.factor * super().losses(network, batch)

class Slow(FedAvg): ...

class Nothing: ...
"""
POINTS = {
    "fedtune.objectives": {"half": f"{MODULE}:Half", "kto": f"{MODULE}:Half"},
    "fedtune.strategies": {"slow": f"{MODULE}:Slow", "odd": f"{MODULE}:Nothing"},
}


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "installed", monkeypatch, MODULE, CODE, POINTS)


def imported() -> bool:
    return MODULE in sys.modules


def asking(base: Path, name: str = "half") -> Study:
    made = begun(base).study
    return made.model_copy(update={"objective": made.objective.model_copy(update={"name": name})})


def site(folder: Path, **policy: object) -> SiteWorker:
    notes(folder)
    return SiteWorker(make_site(folder, policy, patient="who"))


def test_a_foreign_name_is_refused_and_nothing_of_it_is_imported(
    tmp_path: Path, tiny_base: Path
) -> None:
    worker, plan = site(tmp_path), asking(tiny_base)
    answer = worker.prepare(plan, begun(tiny_base).frozen)
    assert not answer.admitted and "policy.objectives does not list 'half'" in answer.reason
    seen = review.review(plan, worker.site, worker.ledger)
    assert seen.refusals and seen.sections
    assert not imported()


def test_a_study_toml_is_refused_before_it_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        'privacy = "off"\n[study]\nname = "s"\n[base]\nmodel = "m"\n[objective]\nname = "half"\n'
        "[lora]\n[training]\nrounds = 1\nsampling_rate = 1.0\nlearning_rate = 1.0\n"
    )
    with pytest.raises(FedtuneError) as caught:
        read_plan(path, site(tmp_path).site)
    assert not imported()
    assert isinstance(caught.value, PolicyRefused) and "'half'" in str(caught.value)
    assert load_study(path).objective.name == "half"  # one's own study
    assert imported()


def test_a_plan_whose_plug_in_the_policy_names_is_admitted(tmp_path: Path, tiny_base: Path) -> None:
    worker, plan = site(tmp_path, objectives=["release", "half"]), asking(tiny_base)
    assert worker.prepare(plan, begun(tiny_base).frozen).admitted
    assert imported()


def test_a_review_that_resolves_what_the_policy_refuses_is_seen(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin of the first test: the rule that guards the import is left out."""
    worker, plan = site(tmp_path), asking(tiny_base)
    monkeypatch.setattr(policy, "may_resolve", lambda study, policy: True)
    assert list(policy.refusals(plan, worker.site, None))
    assert imported()


def test_foreign_strategies_and_modalities_are_refused_by_name(
    tmp_path: Path, tiny_base: Path
) -> None:
    made, here = begun(tiny_base).study, site(tmp_path).site
    strategy = made.strategy.model_copy(update={"name": "slow"})
    base = made.base.model_copy(update={"modality": "scans"})
    for changed, rule in (
        ({"strategy": strategy}, "policy.strategies does not list 'slow'"),
        ({"base": base}, "policy.modalities does not list 'scans'"),
    ):
        found = list(policy.refusals(made.model_copy(update=changed), here, None))
        assert [str(r) for r in found if rule in str(r)]
    assert not imported()


def test_a_name_of_the_release_is_always_the_releases_own() -> None:
    assert OBJECTIVES.load("kto").__module__ == "fedtune.core.objectives.kto"
    assert OBJECTIVES.installed() == ["half"] and not imported()
    assert OBJECTIVES.build("half", {"factor": 0.25}).factor == 0.25  # type: ignore[attr-defined]


def test_what_is_no_plug_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"somebody_elses:Nothing is no plug-in of fedtune\.str"):
        STRATEGIES.load("odd")
    with pytest.raises(ConfigError, match=", ".join(STRATEGIES.release())) as unknown:
        STRATEGIES.load("fast")
    assert {"odd", "slow"} <= set(str(unknown.value).replace('"', "").split(", "))
    points = {"fedtune.strategies": {"slow": "another:Slow", "torn": "another:Slow"}}
    install(tmp_path / "twice", monkeypatch, "another", "raise RuntimeError('boom')", points)
    with pytest.raises(ConfigError, match="installed more than once"):
        STRATEGIES.load("slow")
    with pytest.raises(ConfigError, match=r"another:Slow cannot be imported \(RuntimeError: boom"):
        STRATEGIES.load("torn")
