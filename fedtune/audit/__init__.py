"""Empirical audits: what an attacker finds, beside what is claimed, on generated data alone.

An audit gives a LOWER bound on ε. It can show that a claim is broken, never that it holds: that is
the proof's work."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.audit import coins
from fedtune.audit.coins import OneRun, one_run
from fedtune.audit.gaussian import OneStep, one_step
from fedtune.audit.secret import Exposure, exposure
from fedtune.bases.find import find_base
from fedtune.config import Study, load_study
from fedtune.dp.plan import DpPlan, plan_for_site
from fedtune.errors import ConfigError, InputError
from fedtune.files.writing import replace as write_file
from fedtune.models.network import build
from fedtune.models.tiny import tiny_network

TRIALS = 10_000
DATA = "generated records alone; nothing of a site was read"
__all__ = ["TRIALS", "Exposure", "OneRun", "OneStep", "audit_study", "exposure", "one_run"]
__all__ += ["one_step"]


def audit_study(
    study_path: Path,
    out: Path,
    trials: int = TRIALS,
    run: Path | None = None,
    declared_size: int = 100,
) -> dict[str, Any]:
    """All audits of a study, written to `out`/audit.json and returned.

    run: a finished run of it; then σ and C are the smallest and the largest that its report
    counted, the exposure of its adapter is added, and the audit goes into its report.
    declared_size matters only where the study gives expected_batch. Nothing here costs ε: the
    records are generated, and an adapter that was released is public.
    Errors: ConfigError (no privacy to audit), InputError (not a run folder), ModelError."""
    study = load_study(study_path)
    if not study.private:
        raise ConfigError(
            'privacy = "off": there is no ε to audit', "a [privacy] table", "audit the private twin"
        )
    report = _report(run, study) if run else None
    plan = plan_for_site(study, declared_size)
    if report:
        plan = _as_it_ran(plan, report)
    network = tiny_network(study, find_base(study.base.model, study.base.digest))
    step, whole = one_step(plan, trials), one_run(study, network, coins.CANARIES)
    body: dict[str, Any] = {
        "fedtune": __version__,
        "study": study.study.name,
        "data": DATA,
        "passed": step.passed and whole.passed,
        "one_step": asdict(step) | {"passed": step.passed, "weak": step.weak},
        "one_run": asdict(whole) | {"passed": whole.passed},
        "exposure": None,
    }
    if run and report:
        found = _exposure(run)
        body["exposure"] = asdict(found) | {"exposed": found.exposed}
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False)
    write_file(out / "audit.json", (text + "\n").encode())
    if run and report:
        from fedtune.report import write

        write(run, report | {"audit": body})
    return body


def _report(run: Path, study: Study) -> dict[str, Any]:
    from fedtune.run_folder import load_plan, read_report

    if load_plan(run).study.name != study.study.name:
        raise InputError(f"{run}: is a run of another study", f"one of {study.study.name}")
    return read_report(run)


def _as_it_ran(plan: DpPlan, report: dict[str, Any]) -> DpPlan:
    """`plan` with the weakest σ and the largest C that a site's step log counted."""
    sites = list((report.get("privacy") or {}).get("sites", {}).values())
    sigmas = [s["noise_multiplier"] for s in sites if s.get("noise_multiplier")]
    norms = [s["max_grad_norm"] for s in sites if s.get("max_grad_norm")]
    return replace(
        plan,
        noise_multiplier=min(sigmas, default=plan.noise_multiplier),
        max_grad_norm=max(norms, default=plan.max_grad_norm),
    )


def _exposure(run: Path) -> Exposure:
    from fedtune.models.adapter_files import load_adapter, picked
    from fedtune.run_folder import load_plan

    study = load_plan(run)
    network = build(study)
    saved = load_adapter(run / "adapter")
    before, factor = network.trainable(), network.frozen_factor()
    try:
        network.load_frozen(picked(saved, factor, run / "adapter"))
        network.load_trainable(picked(saved, before, run / "adapter"))
        return exposure(network, study)
    finally:
        network.load_frozen(factor)
        network.load_trainable(before)
