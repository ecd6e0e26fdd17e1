"""Traps 22, 25: a site's size and the coordinator's choice of sites change no guarantee."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.server.fakes import FakeSite, Trial, make_study, trial, update_of

__all__ = ["trial"]  # the fixture


def test_equal_weights_are_equal_whatever_the_sites_declare(trial: Callable[..., Trial]) -> None:
    run = trial(FakeSite("a", size=1_000_000), FakeSite("b", size=20))
    study = make_study(min_sites=2)
    once = study.training.model_copy(update={"rounds": 1})
    equal = study.strategy.model_copy(update={"weights": "equal"})
    run.run(study.model_copy(update={"training": once, "strategy": equal}))
    a, b = (update_of(n)["layer.C"] for n in "ab")
    np.testing.assert_allclose(run.adapter()["layer.C"], (a + b) / 2, rtol=1e-6)


def test_choosing_sites_amplifies_nothing(trial: Callable[..., Trial]) -> None:
    """ε is what the site's own steps cost, although the coordinator asks half of the sites."""
    sites = [FakeSite(name) for name in "abcd"]
    body = trial(*sites).run(make_study(fraction=0.5))
    asked = {site.name: len(site.calls) for site in sites if site.calls}
    assert sum(asked.values()) == 8
    for name, steps in asked.items():
        assert body["privacy"]["sites"][name]["epsilon"] == pytest.approx(0.25 * steps / 1.5)
