"""Run the demo: three hospitals together, then each of them alone, at the same ε."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune import report
from fedtune.core.config import Site, Study, load_study
from fedtune.core.progress import OnEvent
from fedtune.core.wire.keys import SigningKey
from fedtune.demo.generate import NINE, write
from fedtune.evidence.sign import sign_files
from fedtune.launch.simulate import simulate
from fedtune.officer.site_files import load_sites
from fedtune.runs.run import Run

QUICK: dict[str, Any] = {"departments": NINE, "share": 1 / 3, "rounds": 3}


def run_demo(
    out: Path | str,
    on_event: OnEvent | None = None,
    *,
    seed: int = 0,
    alone: bool = True,
    quick: bool = False,
) -> Run:
    """Invent three hospitals under out/data, and run their study into `out`. Return the run.

    - out: the run's folder, which must not hold a run yet
    - on_event: called with each event's kind and public facts, such as ("round", {…}); None: nobody
      is told. The event "done" comes last, after each hospital has also been trained by itself
    - seed: decides every invented note, and is the plan's study.seed
    - alone: also train each hospital by itself, for comparison; the report's "alone" holds the
      accuracy that each reaches
    - quick: take nine departments, a third of the patients and three rounds, and train no hospital
      alone: enough to check that an installation works

    Errors: ModelError if the base cannot be fetched, InfrastructureError."""
    out = Path(out)
    done_events: list[tuple[str, dict[str, Any]]] = []

    def forward(event: str, data: dict[str, Any]) -> None:
        """Pass an event on to `on_event`. The event "done" is kept back until each hospital has
        also been trained by itself."""
        if event == "done":
            done_events.append((event, data))
        elif on_event:
            on_event(event, data)

    forward("step", {"text": "inventing three hospitals"})
    study = load_study(write(out / "data", seed=seed, **(QUICK if quick else {})))
    sites = load_sites(out / "data" / "sites")
    key = SigningKey()
    run = simulate(study, sites, out, on_event=forward, key=key)
    body: dict[str, Any] = run.report | {"invented": True}
    if alone and not quick:
        body["alone"] = {
            site.site.name: _run_alone(study, site, out / "alone" / site.site.name, on_event)
            for site in sites
        }
    report.write(out, body)
    sign_files(out, key)
    for event in done_events:
        if on_event:
            on_event(*event)
    return Run(out)


def _run_alone(study: Study, site: Site, out: Path, on_event: OnEvent | None) -> float:
    """Run the study with one hospital and a separate ledger, and return the accuracy after
    training, as a share of the test records. In the hospital's own ledger the ε of this study and
    of the joint one would add up, and the hospital's policy would refuse the second study.

    - study: the plan of the three hospitals, of which only strategy.min_sites is changed
    - site: the hospital; its ledger for this run is in state-alone, beside its own state folder
    - out: the folder of this run
    - on_event: called with ("step", {…}) after each round; None: nobody is told"""
    name, state = site.site.name, site.site.state.with_name("state-alone")

    def report_step(event: str, data: dict[str, Any]) -> None:
        if on_event and event == "round":
            text = f"{name} alone, for comparison"
            on_event("step", {"text": text, "done": data["round"], "total": data["rounds"]})

    run = simulate(
        study.changed(strategy={"min_sites": 1}),
        [site.changed(site={"state": state})],
        out,
        on_event=report_step,
    )
    return float(run.report["quality"]["after"]["accuracy"])
