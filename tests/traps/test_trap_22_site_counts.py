"""Traps 21, 22, 29: how many units a site has is seen nowhere outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.errors import DataError
from fedtune.core.vault.worker import SiteWorker
from tests.client.test_site import begun, make_site, notes


@pytest.mark.parametrize("patients", [0, 1, 3, 11, 12, 13, 30])
def test_the_answers_are_the_same_whatever_the_number_of_patients(
    tmp_path: Path, tiny_base: Path, patients: int
) -> None:
    """The declared size is 12."""
    notes(tmp_path, patients)
    worker, made = SiteWorker(make_site(tmp_path, patient="who")), begun(tiny_base)
    try:
        said = worker.prepare(made.study, made.frozen)
        again = worker.prepare(made.study, made.frozen)
    except DataError:
        pytest.fail("too few units were made known")
    assert said == again
    assert (said.admitted, said.reason, said.declared_size) == (True, "", 12)
    (event,) = worker.train(made.study.digest, 1, made.adapter).events
    assert set(event) == {"sigma", "q", "max_grad_norm", "records", "steps"}
    assert (event["q"], event["steps"], event["records"]) == (1.0, 1, 1)
    # Whoever is there takes part: a lone patient who did not would move the sum by two patients
    # where a second one leaves.
    network = worker._prepared[made.study.digest].network
    data = worker.data_in_study(made.study, network, worker.site.data)
    assert data.dataset.n_units == patients
