"""What could go wrong at this site, looked at before it does. Nothing leaves this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from client.policy import refusals
from client.site import check_data
from fedtune.config import Site, Study, load_site
from fedtune.data.records import read_records
from fedtune.dp import selftest
from fedtune.dp.ledger import Ledger
from fedtune.dp.plan import plan_for_site
from fedtune.errors import FedtuneError
from fedtune.flower.forwarder import Forwarder, link
from fedtune.models.network import build

LOOK_SECONDS = 3.0  # for the way to the coordinator
FREE_GB = 2.0  # for the base's cache, the outbox and the ledger


@dataclass(frozen=True)
class Finding:
    """One check: `says` is for the site's own eyes and may hold counts of its records."""

    name: str
    good: bool
    says: str


def examine(path: Path, study: Study | None = None) -> Iterator[Finding]:
    """Each check as soon as it is done; with a study also its plan, its data and the self-test.

    Errors: ConfigError where site.toml cannot be read; all else is a finding."""
    site = load_site(path)
    yield Finding("site file", True, f"{path}: {site.site.name}")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("records", lambda: _records(site)),
        ("ledger", lambda: _ledger(site)),
        ("disk", lambda: _disk(site)),
    ]
    if site.coordinator:
        checks.append(("node key", lambda: _node_key(site)))
        checks.append(("coordinator", lambda: _coordinator(site, path)))
    for name, check in checks:
        yield _finding(name, check)
    if study is None:
        return
    for name, check in [
        ("base", lambda: build(study, site.site.base).base.digest),
        ("plan", lambda: _plan(study, site)),
        ("records for the plan", lambda: _fits(site, study)),
    ]:
        yield _finding(name, check)
    try:
        network = build(study, site.site.base)
    except FedtuneError:
        return
    for result in selftest.run(study, network, site.site.declared_size):
        says = result.note or f"{result.figure:.3g}, at most {result.bound:g}"
        yield Finding(f"self-test: {result.name}", result.passed, says)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except FedtuneError as error:
        return Finding(name, False, str(error))


def _records(site: Site) -> str:
    """The true count beside the declared one: the one place where the two meet."""
    by_patient = site.data.columns.patient is not None
    records, rejected = read_records(site.data, unit="patient" if by_patient else "record")
    units = len({record.unit for record in records})
    unit = "patients" if by_patient else "records"
    declared, left_out = site.site.declared_size, sum(rejected.values())
    says = f"{len(records)} usable records, {units} {unit}; declared_size = {declared}"
    if left_out:
        says += "; left out: " + ", ".join(f"{n} {why}" for why, n in rejected.most_common())
    if units < 2:
        raise FedtuneError(says, "at least 2", "without them this site sends noise alone")
    if not declared / 2 <= units <= 2 * declared:
        raise FedtuneError(
            says,
            "a declared size within a factor of two",
            "declare another round figure by hand; what is declared is public",
        )
    return says


def _ledger(site: Site) -> str:
    if not site.site.state.exists():
        return f"{site.site.state}: none yet; begins with the first study"
    ledger = Ledger(site.site.state)
    ledger.verify()
    return f"{site.site.state}: whole; {len(ledger.spending())} charges"


def _disk(site: Site) -> str:
    place = site.site.state
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    if free < FREE_GB or not os.access(place, os.W_OK):
        raise FedtuneError(f"{place}: {free:.1f} GB free", f"{FREE_GB:g} GB, writable")
    return f"{free:.0f} GB free"


def _node_key(site: Site) -> str:
    assert site.coordinator is not None
    key = site.site.state / "keys" / "node.key"
    if not key.exists():
        raise FedtuneError(f"{key}: no such file", todo="`fedtune enroll` makes it")
    if key.stat().st_mode & 0o077:
        raise FedtuneError(f"{key}: other users can read it", todo="chmod 600")
    return f"{key}: for this user alone"


def _coordinator(site: Site, path: Path) -> str:
    """The answer, this site's certificate, and the way to the gateway, as `fedtune client` goes."""
    found = link(site, path)
    at = f"{found.host}:{found.port}"
    with tempfile.TemporaryDirectory() as folder, Forwarder(found, Path(folder), 0.5) as way:
        time.sleep(LOOK_SECONDS)
        if way.distrust:
            raise FedtuneError(
                f"{at}: the certificate does not verify",
                "one that this consortium's CA signed for that name",
                "ask the coordinator which name `fedtune server --name` was given; check the clock",
            )
        if way.refusal:
            raise FedtuneError(f"{at}: refuses this site: {way.refusal}")
        if way.away:
            raise FedtuneError(
                f"{at}: does not answer", todo="check address, proxy and firewall, or start it"
            )
    return f"{at}: answers, and lets this site in"


def _plan(study: Study, site: Site) -> str:
    plan = plan_for_site(study, site.site.declared_size) if study.private else None
    for refusal in refusals(study, site, plan):
        raise refusal
    return f"σ = {plan.noise_multiplier}, ε = {plan.epsilon:.3f}" if plan else "NOT PRIVATE"


def _fits(site: Site, study: Study) -> str:
    check_data(site, study)
    return "usable"
