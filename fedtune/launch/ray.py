"""Simulate a study in Flower's own runtime (Ray): sites in several processes at once."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.core.config import Study
from fedtune.core.errors import FedtuneError, InfrastructureError
from fedtune.flower.grid import PEERS, SIMULATED
from fedtune.server import rounds
from fedtune.server.parts import Dependencies

LOOPBACK = "127.0.0.1"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # With clustering, Ray would replace 127.0.0.1 by an address that other machines can reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def simulate_ray(
    study: Study,
    sites: Sequence[Path],
    out: Path,
    *,
    resume: bool = False,
    on_event: Callable[[str, dict[str, Any]], None] | None = None,
    parts: Dependencies | None = None,
    processes: int = 1,
    peers: str = "",
) -> dict[str, Any]:
    """Simulate a study in Flower's own runtime, and return the report's content. Each of
    `processes` Ray workers holds its own copy of the base in memory.

    Errors: as server.rounds.run; InfrastructureError if Ray is not installed or fails."""
    if importlib.util.find_spec("ray") is None:
        raise InfrastructureError(
            "the ray engine is not installed", todo="pip install 'fedtune[ray]'"
        )
    os.environ.update(QUIET)
    from flwr.simulation import run_simulation

    result: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            result["body"] = rounds.run(
                grid, study, out, resume=resume, on_event=on_event, parts=parts
            )
        except FedtuneError as error:
            result["error"] = error

    client = site_app([str(path.resolve()) for path in sites], peers)
    try:
        run_simulation(server, client, len(sites), backend_config=_backend(processes))
    except Exception as error:
        raise InfrastructureError(f"the ray engine failed ({type(error).__name__})") from error
    if "error" in result:
        raise result["error"]
    report: dict[str, Any] = result["body"]
    return report


def site_app(sites: list[str], peers: str = "") -> ClientApp:
    """Wrap the installed ClientApp so that each of Ray's partitions answers for one site file.

    Ray passes a site's messages to any worker, so the plan is stored in the node's context and sent
    to a worker that does not have it yet."""
    app = ClientApp()

    @app.query("prepare")
    def prepare(message: Message, context: Context) -> Message:
        context.state.update(message.content)
        return _answer(message, context, sites, peers)

    def work(message: Message, context: Context) -> Message:
        return _answer_with_plan(message, context, sites, peers)

    app.train()(work)
    app.train("ready")(work)
    app.train("masked")(work)
    app.query("evaluate")(work)

    return app


def _answer_with_plan(message: Message, context: Context, sites: list[str], peers: str) -> Message:
    """Return the site's answer; first send the plan to a worker that does not have it."""
    reply = _answer(message, context, sites, peers)
    status = reply.content.config_records["site"]["status"]
    if status == "unprepared" and "plan" in context.state:
        from fedtune.core.vault.answers import answer
        from fedtune.core.wire.requests import Request
        from fedtune.launch.in_one_process import place_of

        plan = context.state
        frozen = plan.array_records["frozen"]
        answer(place_of(context), Request("prepare", plan.config_records, frozen))
        reply = _answer(message, context, sites, peers)
    return reply


def _answer(message: Message, context: Context, sites: list[str], peers: str) -> Message:
    from fedtune.launch.in_one_process import app as installed

    context.node_config["site"] = sites[int(context.node_config["partition-id"])]
    context.node_config |= {SIMULATED: True, PEERS: peers}
    return installed(message, context)


def _backend(processes: int) -> dict[str, Any]:
    init = {
        "num_cpus": processes,
        "include_dashboard": False,
        "log_to_driver": False,
        "_node_ip_address": LOOPBACK,
    }
    return {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
