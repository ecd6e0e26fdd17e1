"""A courier whose app is the test's own. Nothing that trains is imported: each site of a federation
is a process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message

from fedtune.core.config import load_site
from fedtune.core.errors import Stopped
from fedtune.core.processes import alone, interruptible
from fedtune.core.progress import OnEvent
from fedtune.courier.executor import App, Executor
from fedtune.flower.forwarder import Forwarder
from fedtune.flower.link import link
from fedtune.flower.ports import bypass_proxy


def join_with(
    app: App,
    site_path: Path,
    *,
    once: bool = False,
    on_event: OnEvent | None = None,
    patience: float = 90.0,
) -> None:
    """Run a courier whose app is the test's own, and which asks each second whether the site is
    still admitted. Errors: as of `launch.site.join`."""
    site = load_site(site_path)
    state = site.site.state / "flower"
    bypass_proxy()

    def at_this_site(message: Message, context: Context) -> Message:
        context.node_config = {"site": str(site_path)}
        return app(message, context)

    executor = Executor(at_this_site, on_event or (lambda *_: None), once)
    with (
        suppress(Stopped),
        interruptible(),
        alone(state, "fedtune client"),
        Forwarder(link(site, site_path), state, watch=1.0) as forwarder,
    ):
        executor.run_supernodes(state, forwarder, patience)
