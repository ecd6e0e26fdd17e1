"""The demo: three hospitals together, then each of them alone, at the same ε."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune import report
from fedtune.config.sites import sites_in
from fedtune.demo.generate import write
from fedtune.launch.simulate import simulate

OnEvent = Callable[[str, dict[str, Any]], None]


def run_demo(
    out: Path, on_event: OnEvent | None = None, *, seed: int = 0, alone: bool = True
) -> dict[str, Any]:
    """Generate the hospitals under out/data, run their study into `out`, and return the report's
    body; "alone" holds the accuracy that each hospital reaches by itself."""
    ended: list[tuple[str, dict[str, Any]]] = []

    def tell(event: str, data: dict[str, Any]) -> None:
        """The demo is done when the hospitals alone are."""
        if event == "done":
            ended.append((event, data))
        elif on_event:
            on_event(event, data)

    tell("step", {"text": "inventing three hospitals"})
    study = write(out / "data", seed=seed)
    sites = sites_in(out / "data" / "sites")
    body = simulate(study, sites, out, on_event=tell)
    if alone:
        body["alone"] = {
            site.parent.name: _alone(study, site, out / "alone" / site.parent.name, on_event)
            for site in sites
        }
        report.write(out, body)
    for event in ended:
        if on_event:
            on_event(*event)
    return body


def _alone(study: Path, site: Path, out: Path, on_event: OnEvent | None) -> float:
    """The same study with one hospital. It keeps another step log: in one log the two studies would
    add up, and the hospital's own ceiling would rightly refuse the second."""
    single = study.with_name(f"study-{site.parent.name}.toml")
    single.write_text(study.read_text().replace("min_sites = 3", "min_sites = 1"))
    twin = site.with_name("alone.toml")
    twin.write_text(site.read_text().replace("[data]", 'state = "state-alone"\n\n[data]', 1))

    def quietly(event: str, data: dict[str, Any]) -> None:
        if on_event and event == "round":
            text = f"{site.parent.name} alone, for comparison"
            on_event("step", {"text": text, "done": data["round"], "total": data["rounds"]})

    body = simulate(single, [twin], out, on_event=quietly)
    return float(body["quality"]["after"]["accuracy"])
