"""Check the coordinator's machine, plan, keys and port before a study. Nothing leaves this
machine."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from fedtune.accounting.rounds import with_rounds
from fedtune.core.config import Study, load_study
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.calibration import resolve
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError
from fedtune.core.files import reading
from fedtune.core.processes import is_reachable
from fedtune.doctor import machine, tls
from fedtune.doctor.machine import Check, Finding, findings
from fedtune.flower import certs, enrol
from fedtune.flower.ports import address_of, own_name

ROUNDS_KEPT = 4  # disk space to have, in adapters per site: Flower keeps what is sent and received
RESTORE = "restore it from a backup: sites trust no other CA"
START = "`fedtune server` renews it when it starts, and while it runs"


class Place(NamedTuple):
    """Where a coordinator runs.

    - home: the coordinator's home folder
    - host, port: where the coordinator listens
    - names: the names by which sites reach it, as in `fedtune server --name`"""

    home: Path
    host: str
    port: int
    names: Sequence[str]

    @property
    def hostnames(self) -> list[str]:
        """The names by which sites connect: the values of --name or, without --name, the name in
        the address that sites were given."""
        file = self.home / "address"
        if self.names or not os.path.lexists(file):
            return list(self.names)
        address = reading.text(file, "host:port", "start the server with --name", ConfigError)
        return list(filter(None, [address.strip().rpartition(":")[0].strip("[]")]))


def examine(path: Path, place: Place, settings: Sequence[str] = ()) -> Iterator[Finding]:
    """Check a study and its coordinator's home and port, and yield each check's finding when the
    check ends.

    - path: study.toml
    - place: where the coordinator runs
    - settings: texts that replace values of study.toml, such as "privacy.epsilon=2"

    Errors: ConfigError if study.toml cannot be read; every other error becomes a finding."""
    study = load_study(path, settings=settings)
    yield Finding("study file", True, f"{path}: {study.study.name}")
    yield from findings(
        [
            ("versions", machine.versions),
            ("plan", lambda: _plan(study)),
            ("public files", lambda: _files(study)),
        ]
    )
    yield from _for_study(study, place)
    if (place.home / "ca.pem").exists() or certs.has_begun(place.home):
        yield from _consortium(place)
    else:
        yield Finding("home", True, f"{place.home}: none yet; `fedtune server` makes it")
    yield from findings([("port", lambda: _port(place))])


def _plan(study: Study) -> str:
    """Return a text for the finding about the plan: σ, rounds and ε if they are the same for every
    site, else which command shows them; "NOT PRIVATE" for a study without privacy. Errors:
    ConfigError if the rounds cost more than the plan's ε."""
    if isinstance(study.privacy, str):
        return "NOT PRIVATE"
    resolved = with_rounds(study)
    if study.training.sampling_rate is None:
        return "σ and q follow from each site's size: `fedtune plan` shows them (--size N)"
    plan, k = resolve(resolved, declared_size=1), study.records_per_draw
    steps = plan.rounds * study.training.local_steps
    spent = epsilon(
        [Steps(plan.noise_multiplier, plan.sampling_rate, steps, k)], study.privacy.delta
    )
    target = study.privacy.epsilon
    if target is not None and spent > target:
        raise ConfigError(f"ε = {spent:.4f} after {plan.rounds} rounds", f"{target} at most")
    return f"σ = {plan.noise_multiplier}, {plan.rounds} rounds, ε = {spent:.3f}"


def _files(study: Study) -> str:
    named = {name: getattr(study, name) for name in ("public", "selection", "evaluation")}
    for table, file in named.items():
        if file is not None and not file.path.is_file():
            raise ConfigError(
                f"{file.path}: no such file",
                todo=f"put it there, or correct [{table}] in study.toml",
            )
    return ", ".join(table for table, file in named.items() if file) or "none in the study"


def _for_study(study: Study, place: Place) -> Iterator[Finding]:
    try:
        base = machine.base(study)
        need = machine.need(study, base)
    except FedtuneError as error:
        yield Finding("base", False, str(error))
        yield from findings([("disk", lambda: machine.disk(place.home, machine.FREE))])
        return
    yield Finding("base", True, f"{base}: {study.base.digest or 'no digest in the study yet'}")
    sites = max(study.strategy.min_sites, len(list((place.home / "nodes").glob("*.json"))))
    least = machine.FREE + ROUNDS_KEPT * need.adapter * sites
    yield from findings(
        [
            ("disk", lambda: machine.disk(place.home, least)),
            ("memory", lambda: machine.memory(need.memory)),
        ]
    )


def _consortium(place: Place) -> Iterator[Finding]:
    """Check the CA, the gateway's certificate, the keys and the registry, and yield a finding for
    each check."""
    home = place.home
    yield from findings([("secrets", lambda: _check_private(home))])
    try:
        authority = certs.certificate_in(home / "ca.pem", RESTORE)
        yield from findings([("CA", lambda: _ca(authority)), ("clock", lambda: _clock(home))])
        leaf = certs.certificate_in(home / "server.pem", "delete it: a new one is made")
    except FedtuneError as error:
        yield Finding("certificates", False, str(error))
        return
    listed: list[tuple[str, Check]] = [
        ("certificate", lambda: tls.certificate(leaf, authority, tls.LEAF_LEFT, START)),
        ("names", lambda: _names(leaf, place)),
        ("sites", lambda: _sites(home)),
    ]
    yield from findings(listed)


def _check_private(home: Path) -> str:
    names = ("ca.pem", "server.pem", "signing.key", "flower/executor.secret", "flower/loopback.key")
    return machine.secrets(home / name for name in names)


def _ca(authority: x509.Certificate) -> str:
    new = "it cannot be renewed: plan a new consortium, in which every site enrolls again"
    return tls.certificate(authority, authority, tls.CA_LEFT, new)


def _names(leaf: x509.Certificate, place: Place) -> str:
    if not place.hostnames:
        return "nobody has been told an address yet: start with --name, or admit with --address"
    return "; ".join(tls.names(leaf, name) for name in place.hostnames)


def _clock(home: Path) -> str:
    return f"{enrol.check_clock(home):%Y-%m-%d %H:%M} UTC, later than all that is on record here"


def _sites(home: Path) -> str:
    """Check the certificate of each admitted site. Return a text with the number of sites that are
    admitted and revoked. Errors: ConfigError if a certificate expired, or is about to and was not
    renewed."""
    admitted = enrol.registry(home)
    for name, record in admitted.items():
        leaf = enrol.leaf_of(home, record)
        if leaf is None:
            continue
        remaining = leaf.not_valid_after_utc - certs.read_clock()
        if remaining < timedelta(0):
            raise ConfigError(
                f"{name}: its certificate expired on {leaf.not_valid_after_utc:%Y-%m-%d}",
                todo=f"ask {name} to run `fedtune enroll` again, and admit the request",
            )
        if remaining < tls.LEAF_LEFT:
            raise ConfigError(
                f"{name}: its certificate ends on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M}, and "
                "was not renewed",
                todo=f"ask {name} to start `fedtune client`, which renews it by itself",
            )
    gone = {record.name for record in enrol.list_revoked(home)} - set(admitted)
    return f"{len(admitted)} admitted ({', '.join(admitted) or 'nobody'}), {len(gone)} revoked"


def _port(place: Place) -> str:
    """Check that the port is free, or in use by this coordinator's own gateway; return a text that
    says which. Errors: InfrastructureError if neither is so."""
    host, port = place.host, place.port
    at = address_of(host, port)
    if not is_reachable(own_name(host), port):
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
            why = error.strerror if isinstance(error, OSError) else "not a host name"
            raise InfrastructureError(
                f"{at}: cannot be listened on ({why})",
                todo="choose another with --host or --port",
            ) from None
        return f"{at}: free"
    shown = tls.fetch_certificate(
        lambda context: asyncio.open_connection(own_name(host), port, ssl=context), at
    )
    file = place.home / "server.pem"
    if not file.exists() or certs.certificate_in(file, "").public_key() != shown.public_key():
        raise InfrastructureError(
            f"{at}: in use by a server with another certificate",
            "a free port, or this consortium's gateway",
            "choose another port with --port, or name the gateway's own home with --home",
        )
    return f"{at}: the gateway answers, with the certificate above"
