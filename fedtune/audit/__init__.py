"""Audit a claimed ε empirically, by attacking a study on generated records only.

An audit gives a lower bound on ε. It can show that a claim is false, but not that it holds; only
the proof shows that."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.audit import coins
from fedtune.audit.coins import OneRun, one_run
from fedtune.audit.gaussian import TRIALS, OneStep, one_step
from fedtune.audit.secret import Exposure, exposure
from fedtune.core.bases.find import find_base
from fedtune.core.config import Study
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.errors import ConfigError, InputError
from fedtune.core.files.writing import replace as write_file
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.build import build
from fedtune.core.models.tiny import tiny_network
from fedtune.report.claim import assumption
from fedtune.runs.run import Run

AUDIT = "audit.md"  # in the folder of a run that was audited
DATA = "generated records alone; nothing of a site was read"
__all__ = ["AUDIT", "TRIALS", "Exposure", "OneRun", "OneStep", "audit_study", "exposure", "one_run"]
__all__ += ["one_step"]


def audit_study(
    study: Study,
    out: Path | str,
    trials: int = TRIALS,
    run: Run | None = None,
    declared_size: int = 100,
) -> dict[str, Any]:
    """Attack a study on generated records, and compare lower bounds on ε with the ε that is
    claimed.

    Args:
        study: the private study whose plan, architecture and training code are attacked.
        out: the folder for audit.json, whose content is also returned.
        trials: the number of test units (canaries) that are in their step in the audit of one step.
            As many are not in their step.
        run: a finished run of the study. The audit then attacks the plan that ran, takes the
            smallest σ and the largest clipping norm of its report, measures the exposure of its
            adapter too, and writes audit.md to its folder. None: only the plan is audited.
        declared_size: a site's size; it matters only if the study gives expected_batch.

    This costs no ε: the records are generated, and a released adapter is public.

    Errors: ConfigError (no privacy to audit), InputError (a run of another study), ModelError."""
    out = Path(out)
    if not study.private:
        raise ConfigError(
            'privacy = "off": there is no ε to audit',
            "a [privacy] table",
            "audit the same study with its [privacy] table",
        )
    report = None
    if run:
        study, report = _study_of(run, study), run.report
    plan = plan_for_site(study, declared_size)
    if report:
        plan = _as_it_ran(plan, report)
    network = tiny_network(study, find_base(study.base.model, study.base.digest))
    step_audit, run_audit = one_step(plan, trials), one_run(study, network, coins.CANARIES)
    alone = one_step(_plan_one_site(plan), trials) if plan.sites > 1 else None
    audit: dict[str, Any] = {
        "fedtune": __version__,
        "study": study.study.name,
        "plan_digest": study.digest,
        "data": DATA,
        "passed": all(audit.passed for audit in (step_audit, run_audit, alone) if audit),
        "one_step": asdict(step_audit) | {"passed": step_audit.passed, "weak": step_audit.weak},
        "one_run": asdict(run_audit) | {"passed": run_audit.passed},
        "exposure": None,
    }
    if alone:
        audit["assumption"] = assumption(plan.sites, plan.colluding)
        audit["one_step_alone"] = asdict(alone) | {"passed": alone.passed, "weak": alone.weak}
    if run and report:
        exposed = _exposure(run)
        audit["exposure"] = asdict(exposed) | {"exposed": exposed.exposed}
    text = json.dumps(audit, indent=2, sort_keys=True, ensure_ascii=False)
    write_file(out / "audit.json", (text + "\n").encode())
    if run and report:  # beside its report, which is signed
        from fedtune.report.audit import section

        write_file(run.folder / AUDIT, ("\n\n".join(section(audit)) + "\n").encode())
    return audit


def _study_of(run: Run, study: Study) -> Study:
    """Return the study as it ran, with the digests of base and public arrays that the coordinator
    filled in. Errors: InputError if the run has another name than `study`."""
    if run.study.study.name != study.study.name:
        raise InputError(f"{run.folder}: is a run of another study", f"a run of {study.study.name}")
    return run.study


def _as_it_ran(plan: DpPlan, report: dict[str, Any]) -> DpPlan:
    """Return `plan` with the σ and the clipping norm C that a finished run really had: the smallest
    σ and the largest C that the run's report gives for any site, from the site's step log."""
    sites = list((report.get("privacy") or {}).get("sites", {}).values())
    sigmas = [s["noise_multiplier"] for s in sites if s.get("noise_multiplier")]
    norms = [s["max_grad_norm"] for s in sites if s.get("max_grad_norm")]
    return replace(
        plan,
        noise_multiplier=min(sigmas, default=plan.noise_multiplier),
        max_grad_norm=max(norms, default=plan.max_grad_norm),
    )


def _plan_one_site(plan: DpPlan) -> DpPlan:
    """Return the plan by which one site's noised sum is audited alone: with the σ of the noise that
    the site itself adds, as if no other site shared noise with it."""
    return replace(plan, noise_multiplier=plan.own_noise, sites=1, colluding=0)


def _exposure(run: Run) -> Exposure:
    network = build(run.study)
    saved = run.adapter()
    folder = run.folder / "adapter"
    factor = pick_arrays(saved, network.frozen_factor(), folder)
    with network.loaded(factor, pick_arrays(saved, network.trainable(), folder)):
        return exposure(network, run.study)
