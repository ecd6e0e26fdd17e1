"""Serve Prometheus metrics on this machine's loopback only: `--metrics-port N`.

    coordinator   rounds done and planned, participants, missing by reason, bytes, seconds, ε
    site          connected, rounds sent, ε spent and remaining on the dataset

Guarantee: a figure depends on records only through DP's noise, or follows from settings that a
person entered; a site's ε follows from its charges alone. The port asks for no token, so every
account of the machine can read the figures, and so can the site's courier, the process that uses
the network. If several memberships of a hospital share one ledger, the figures are therefore those
of this site's membership alone: what the other memberships spent would tell this site's coordinator
that the hospital is in other consortia too.

Neither role exports the number of a ledger's entries (it grows when data changes or a patient
withdraws), counts of records (rejected, too long, sampled), losses at a site, gradient norms, or
seconds per batch. Each of these can reveal whether a patient's record is present. A metrics store
keeps figures for years, and the people who may read a dashboard are often not allowed to read the
records. A person at the site sees the number of rejected records with `fedtune doctor`.

Labels are site names, the phrases of registry/reasons.py and fixed words, so a site cannot add
series at will.
Errors: ConfigError without prometheus-client, or for an address other than loopback;
InfrastructureError if the port is taken.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError
from fedtune.core.registry.reasons import OTHER
from fedtune.observe.log import Record, Role, cleaned, strict_here

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import GaugeMetricFamily

    from fedtune.core.config import PolicyTable
    from fedtune.core.ledger.ledger import Ledger

HOST = "127.0.0.1"
SECONDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600)  # upper bounds of the histogram of round times


class Metrics:
    """The Prometheus figures of a coordinator or a site. An object is called with each event, as
    `on_event`, and updates the figures. They are served on loopback if `port` is given.

    - role: whose figures are kept: a coordinator's or a site's
    - port: the port, 0 for any free one; None serves nothing. The property `port` gives the number
      of the port that is used.
    - site: the site.toml of the site whose budget is shown. The site's ledger is read at the start,
      and at each event with an ε. None shows no budget
    - strict: whether a field that may not be logged raises NotLoggable, in place of being left out;
      None asks the environment (FEDTUNE_STRICT=1)"""

    def __init__(
        self,
        role: Role,
        *,
        port: int | None = None,
        site: Path | None = None,
        strict: bool | None = None,
    ) -> None:
        kinds = _library()
        self.registry: CollectorRegistry = kinds.CollectorRegistry()
        self._strict = strict_here() if strict is None else strict
        self._take: Callable[[Record], None]
        self._ledger: LedgerFigures | None = None
        if role == "coordinator":
            self._take = _coordinator(kinds, self.registry)
        else:
            self._take = _site(kinds, self.registry)
            if site is not None:
                self._ledger = LedgerFigures(site)
                self._ledger.read()
                self.registry.register(self._ledger)
        self._serving = None if port is None else serve(self.registry, port)

    @property
    def port(self) -> int | None:
        return self._serving.port if self._serving else None

    def __call__(self, event: str, data: dict[str, Any]) -> None:
        record = cleaned(event, data, strict=self._strict)
        self._take(record)
        if self._ledger is not None and "epsilon" in record:  # only the vault sends such events
            self._ledger.read()

    def close(self) -> None:
        if self._serving:
            self._serving.stop()
            self._serving = None


def _library() -> Any:
    try:
        import prometheus_client
    except ImportError:
        raise ConfigError(
            "--metrics-port needs the package prometheus-client, which is not installed",
            todo="pip install 'fedtune[metrics]'",
        ) from None
    return prometheus_client


# -------------------------------------------------------------------------------- figures


def _coordinator(kinds: Any, registry: CollectorRegistry) -> Callable[[Record], None]:
    def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
        return kinds.Gauge(f"fedtune_{name}", text, labels, registry=registry)

    done = gauge("rounds_done", "Rounds that count, of this study")
    planned = gauge("rounds_planned", "Rounds in the plan")
    trained = gauge("participants", "Sites in the last round that counts")
    epsilon = gauge("epsilon", "ε that a site spent in this study, by its step log", ("site",))
    missing = kinds.Counter(
        "fedtune_missing", "Times that a site was missing", ("reason",), registry=registry
    )
    moved = kinds.Counter("fedtune_bytes", "Bytes of messages", ("direction",), registry=registry)
    took = kinds.Histogram(
        "fedtune_round_seconds", "Seconds per round", buckets=SECONDS, registry=registry
    )

    def take(record: Record) -> None:
        if "rounds" in record:
            planned.set(record["rounds"])
        if record["event"] == "start":
            done.set(record.get("done", 0))
        if record["event"] != "round":
            return
        done.set(record.get("round", 0))
        trained.set(len(record.get("participants", ())))
        for name, spent in record.get("epsilon", {}).items():
            epsilon.labels(name).set(math.inf if spent is None else spent)
        for reason in record.get("missing", {}).values():
            missing.labels(reason or OTHER).inc()
        for direction in ("up", "down"):
            moved.labels(direction).inc(sum(record.get(f"bytes_{direction}", {}).values()))
        if record.get("seconds") is not None:
            took.observe(record["seconds"])

    return take


def _site(kinds: Any, registry: CollectorRegistry) -> Callable[[Record], None]:
    connected = kinds.Gauge(
        "fedtune_connected", "1: the coordinator has accepted this site", registry=registry
    )
    refused = kinds.Counter(
        "fedtune_tasks_refused", "Tasks of a kind that this site never runs", registry=registry
    )

    def take(record: Record) -> None:
        if record["event"] in ("joined", "connected", "answered"):
            connected.set(1)
        elif record["event"] in ("reconnecting", "waiting", "stopped", "done"):
            connected.set(0)
        elif record["event"] == "refused":
            refused.inc()

    return take


class _Spent(NamedTuple):
    key: tuple[str, float, frozenset[str]]  # what the figures follow from: head, δ and memberships
    epsilon: float
    fallback: float
    rounds: int


class LedgerFigures:
    """The budget of a site as a Prometheus collector, from the ledger as it was at the last `read`.
    If the ledger is shared by several memberships of a hospital, the figures are those of this
    site's membership.

    | state of the ledger         | figures                                        |
    | there is no ledger yet      | ledger_readable is 1, and nothing is spent     |
    | there was one; it is gone   | ledger_readable is 0; no other figure is shown |
    | the ledger does not verify  | ledger_readable is 0; no other figure is shown |

    Guarantee: a scrape does not read the ledger. The courier may scrape as often as it likes, and
    could learn from the duration of a read that the ledger has one more entry."""

    def __init__(self, site: Path) -> None:
        self._path, self._mutex = site, threading.Lock()
        self._ledger: Ledger | None = None
        self._cached: _Spent | None = None
        self._shown: dict[str, tuple[str, float]] | None = None

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def read(self) -> None:
        """Read the ledger, and compute the figures that are served from then on."""
        with self._mutex:
            try:
                self._shown = self._figures()
            except FedtuneError:
                self._shown = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        from prometheus_client.core import GaugeMetricFamily

        figures = self._shown
        readable = "1: the ledger verifies, or there is none yet; 0: no other figure is shown"
        yield GaugeMetricFamily("fedtune_ledger_readable", readable, value=figures is not None)
        for name, (text, value) in (figures or {}).items():
            yield GaugeMetricFamily(f"fedtune_{name}", text, value=value)

    def _figures(self) -> dict[str, tuple[str, float]]:
        from fedtune.core.config import load_site

        site = load_site(self._path)
        spent = _Spent(("", 0.0, frozenset()), 0.0, 0.0, 0)
        if (book := self._open(site.home)) is not None:
            spent = self._compute_spent(book, site.data.name, site.policy)
        most, whatever = site.policy.max_epsilon, site.policy.max_fallback_epsilon
        return {
            "epsilon_spent": ("ε of everything released from the dataset", spent.epsilon),
            "epsilon_remaining": ("ε left of policy.max_epsilon", max(0.0, most - spent.epsilon)),
            "fallback_epsilon_spent": (
                "ε of everything released, by this site's own noise alone",
                spent.fallback,
            ),
            "fallback_epsilon_remaining": (
                "ε left of policy.max_fallback_epsilon",
                max(0.0, whatever - spent.fallback),
            ),
            "rounds_released": ("Rounds whose update may have left the site", spent.rounds),
        }

    def _open(self, folder: Path) -> Ledger | None:
        from fedtune.homes.opening import find_ledger

        if self._ledger is None:
            self._ledger = find_ledger(folder)
        return self._ledger

    def _compute_spent(self, book: Ledger, dataset: str, policy: PolicyTable) -> _Spent:
        from fedtune.core.dp.filter import total_epsilon
        from fedtune.core.ledger.entries import are_kinds_known, orders_of, samples_first

        own, delta = policy.own_memberships, policy.delta
        key = book.head.hash, delta, own
        if self._cached is None or self._cached.key != key:
            charges = [each for each in book.spending(dataset) if each.charge.is_paid_by(own)]
            # The ε of a unit that took part in every charge, even if no unit did: which units took
            # part depends on when they arrived, and so on the records.
            paid = [spent.charge for spent in charges]
            events = [charge.event for charge in paid]
            orders, sampled = orders_of(paid), samples_first(paid)
            known = are_kinds_known(paid)
            epsilon = total_epsilon(events, orders, delta, sampled, known).epsilon
            alone = [charge.fallback for charge in paid]
            fallback = total_epsilon(alone, orders, delta, sampled, known).epsilon
            rounds = sum(c.released for c in charges if c.kind == "reserve")
            self._cached = _Spent(key, epsilon, fallback, rounds)
        return self._cached


# -------------------------------------------------------------------------------- serving


class Serving(NamedTuple):
    """A running metrics server. port: the port at which it serves. stop: ends it and frees the
    port."""

    port: int
    stop: Callable[[], None]


def serve(registry: CollectorRegistry, port: int, host: str = HOST) -> Serving:
    """Serve `registry` over HTTP on loopback, from a thread of this process. Return the port, and
    the function that ends the server. port: 0 for any free port. Errors: ConfigError if `host` is
    not loopback; InfrastructureError if the port cannot be opened."""
    if not ip_address(host).is_loopback:
        raise ConfigError(
            f"metrics would be served on {host}",
            f"{HOST}, since they can be read with no password",
            "let a Prometheus agent on this machine read them, or forward the port over SSH",
        )
    try:
        server, thread = _library().start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InfrastructureError(
            f"metrics: port {port} of {host} cannot be opened ({error.strerror})",
            todo="choose another port with --metrics-port",
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return Serving(int(server.server_port), stop)
