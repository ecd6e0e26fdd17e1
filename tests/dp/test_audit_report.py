"""An audit of a whole study, and its report."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedtune import audit
from fedtune.audit import coins, gaussian
from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError, InputError
from fedtune.report.audit import section
from fedtune.runs.run import Run

STUDY = """
[study]
name = "audited"
[base]
model = "{base}"
[lora]
rank = 4
modules = ["q_proj"]
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 4
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
[privacy]
noise_multiplier = 1.0
delta = 1e-5
"""


@pytest.fixture
def study_file(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(coins, "CANARIES", 64)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(base=tiny_base))
    return path


def test_audit_of_a_study(study_file: Path, tmp_path: Path) -> None:
    body = audit.audit_study(load_study(study_file), tmp_path / "out", trials=1000)
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert written == json.loads(json.dumps(body))
    assert body["passed"]
    assert body["one_step"]["trials"] == 1000
    assert body["one_step"]["assumption"] == "Gaussian trade-off"
    assert "generated" in body["data"]
    assert body["exposure"] is None


def test_audit_of_a_run_stands_beside_its_claim(
    study_file: Path, tmp_path: Path, tiny_base: Path
) -> None:
    from fedtune.core.models.build import build
    from fedtune.report import write

    made, run = load_study(study_file), tmp_path / "run"
    network = build(made)
    network.save(run / "adapter")
    (run / "plan.json").write_text(made.model_dump_json())
    site = {"noise_multiplier": 0.8, "max_grad_norm": 0.5, "epsilon": 9.0, "delta": 1e-5}
    write(run, {"study": "audited", "private": True, "privacy": {"sites": {"a": site}}})
    body = audit.audit_study(load_study(study_file), tmp_path / "out", trials=1000, run=Run(run))
    assert body["one_step"]["noise_multiplier"] == 0.8
    assert not body["exposure"]["exposed"]
    assert (run / audit.AUDIT).read_text() == "\n\n".join(section(body)) + "\n"
    report = json.loads((run / "report.json").read_text())  # signed, so it stays as it was
    assert "audit" not in report
    assert report["privacy"]["sites"]["a"] == site


def test_a_plan_without_privacy_has_nothing_to_audit(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text().split("[clipping]")[0]
    study_file.write_text('privacy = "off"\n' + text)
    with pytest.raises(ConfigError, match="no ε to audit"):
        audit.audit_study(load_study(study_file), tmp_path / "out")


def test_a_folder_that_is_no_run_is_refused(study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        audit.audit_study(load_study(study_file), tmp_path / "out", run=Run(tmp_path))


def test_the_section_names_assumption_scope_and_verdict() -> None:
    step = gaussian.OneStep(10_000, 1e-5, 4.38, 4.07, 3.95, 3100, 3090, 1.0, 1)
    whole = coins.OneRun(512, 128, 109, 4, 1e-5, 4.97, 1.31, 0.4)
    body: dict[str, Any] = {
        "data": audit.DATA,
        "passed": True,
        "one_step": asdict(step) | {"passed": True, "weak": False},
        "one_run": asdict(whole) | {"passed": True},
    }
    text = "\n\n".join(section(body))
    for said in ("Gaussian trade-off", "of one step, not of the run", "generated records", "4.38"):
        assert said in text
    assert "contradicts the claim." in text
    broken = replace(step, ceiling=4.9)
    body |= {"passed": False, "one_step": asdict(broken) | {"passed": broken.passed}}
    assert "do not release" in "\n\n".join(section(body))
    assert "broken" in "\n\n".join(section(body))
    assert section({}) == []
