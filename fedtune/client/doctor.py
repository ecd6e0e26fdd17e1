"""What could go wrong at this site, looked at before it does. Nothing leaves this machine but a
greeting to the coordinator, where the site is enrolled with one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from fedtune.audit import selftest
from fedtune.bases.find import Base
from fedtune.client.policy import base_for
from fedtune.client.review import unsigned, would_refuse
from fedtune.client.site_checks import check_data
from fedtune.config import Site, Study, load_site
from fedtune.data.load import LONG, text_members
from fedtune.data.records import read_records, unit_member
from fedtune.doctor import machine, tls
from fedtune.doctor.machine import Finding, findings
from fedtune.dp.plan import plan_for_site
from fedtune.errors import FedtuneError, InfrastructureError, PolicyRefused
from fedtune.flower import certs
from fedtune.flower.forwarder import (
    STATUS,
    Link,
    dial,
    far_context,
    keys_folder,
    link,
    newest,
    proxy_of,
)
from fedtune.ledger.files import KEY, SALT, traces
from fedtune.ledger.ledger import Ledger
from fedtune.models.build import build
from fedtune.wire.protocol import check_peer

RENEW = (
    "a running `fedtune client` renews it by itself; past its end run `fedtune enroll` again, with "
    "the same keys, and have the request admitted"
)


def examine(path: Path, study: Study | None = None) -> Iterator[Finding]:
    """Each check as soon as it is done; with a study also its plan, its data and the self-test.

    Errors: ConfigError where site.toml cannot be read; all else is a finding."""
    site = load_site(path)
    yield Finding("site file", True, f"{path}: {site.site.name}")
    yield from findings(
        [
            ("versions", machine.versions),
            ("records", lambda: _records(site)),
            ("ledger", lambda: _ledger(site)),
            ("same people", lambda: _same_people(site)),
            ("secrets", lambda: _secrets(site)),
        ]
    )
    if study is None:
        yield from findings([("disk", lambda: machine.disk(site.site.state, machine.FREE))])
    if site.coordinator:
        yield from _network(site, path)
    if study is not None:
        yield from _for_study(site, study)


def _for_study(site: Site, study: Study) -> Iterator[Finding]:
    try:
        base = base_for(study, site)
        need = machine.need(study, base.path)
    except FedtuneError as error:
        yield Finding("base", False, str(error))
        return
    kept = need.adapter * (study.training.rounds or 0)  # every update stays in the outbox
    yield Finding("base", True, f"{base.path}: {base.digest}")
    yield from findings(
        [
            ("disk", lambda: machine.disk(site.site.state, machine.FREE + kept)),
            ("memory", lambda: machine.memory(need.memory)),
            ("plan", lambda: _plan(study, site)),
            ("records for the plan", lambda: _fits(site, study, base)),
        ]
    )
    try:
        network = build(study, base)
    except FedtuneError as error:
        yield Finding("self-test", False, str(error))
        return
    rank = study.lora.rank_at(site.site.lora_rank) if study.lora else None
    for result in selftest.run(study, network, site.site.declared_size, rank):
        says = result.note or f"{result.figure:.3g}, at most {result.bound:g}"
        yield Finding(f"self-test: {result.name}", result.passed, says)


def _network(site: Site, path: Path) -> Iterator[Finding]:
    """Enrolment, both certificates, and the way to the gateway, as `fedtune client` goes."""
    try:
        found = link(site, path)
        authority = x509.load_pem_x509_certificate(found.answer.ca.encode())
        own = newest(found)
    except FedtuneError as error:
        yield Finding("enrolment", False, str(error))
        return
    yield Finding("enrolment", True, f"{found.name}, in the consortium {found.answer.fingerprint}")
    mine = lambda: tls.certificate(own, authority, tls.LEAF_LEFT, RENEW)  # noqa: E731
    yield from findings([("certificate", mine)])
    try:
        proxy = proxy_of(found)
        way = lambda context: dial(found, proxy, context)  # noqa: E731
        leaf = tls.presented(way, found.address)
    except FedtuneError as error:
        yield Finding("coordinator", False, str(error))
        return
    strange = "the address may be another's; else ask the coordinator to run `fedtune doctor`"
    yield from findings(
        [
            ("names", lambda: tls.names(leaf, found.host)),
            ("its certificate", lambda: tls.certificate(leaf, authority, timedelta(0), strange)),
        ]
    )
    try:
        status, clock = _greet(found, way)
    except FedtuneError as error:
        yield Finding("coordinator", False, str(error))
        return
    yield Finding("coordinator", True, f"{found.address}: answers, and lets this site in")
    yield from findings(
        [("clock", lambda: tls.clock(clock)), ("protocol", lambda: _protocol(status))]
    )


def _greet(found: Link, way: tls.Dial) -> tuple[dict[str, Any], float]:
    """What the gateway says of itself, and by how many seconds this clock is ahead of its own.

    Errors: InfrastructureError where it does not answer, or turns this site away."""
    sent = certs.now()
    code, body = tls.got(way, far_context(found), found.address, STATUS)
    received = certs.now()
    if code == 403:
        raise InfrastructureError(f"{found.address}: refuses this site: {body.decode()}")
    if code != 200:
        raise InfrastructureError(f"{found.address}: answers {code}: {body.decode()}")
    status: dict[str, Any] = json.loads(body)
    there = str(status.get("now", received.isoformat()))
    return status, tls.ahead_of(sent, there, received)


def _protocol(status: dict[str, Any]) -> str:
    check_peer("the coordinator", status, "this site")
    return f"{status['protocol']} at both ends; fedtune {status['release']} at the coordinator"


def _secrets(site: Site) -> str:
    state, keys = site.site.state, keys_folder(site)
    return machine.secrets([state / KEY, state / SALT, keys / "node.key", keys / "tls.key"])


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
    if not traces(site.site.state):
        return f"{site.site.state}: none yet; begins with the first study"
    ledger = Ledger(site.site.state)
    ledger.verify()
    return f"{site.site.state}: whole; {len(ledger.spending())} charges"


def _same_people(site: Site) -> str:
    """What the guarantee cannot see, for a person to judge: a patient under a second key, and texts
    that datasets share which were declared to share no patient. Boilerplate does both."""
    if not traces(site.site.state):
        return "nobody has taken part here as yet"
    ledger, data = Ledger(site.site.state), site.data
    says = [
        f"datasets {one} and {other} are declared disjoint and share {shared} patients, records or "
        "longer texts"
        for one, other in ledger.disjoint
        if (shared := ledger.overlap(one, other))
    ]
    if data.columns.patient:
        known, texts = ledger.known(data.name), dict[str, bool]()
        for record in read_records(data, unit="patient", strict=False)[0]:
            if not known(unit_member(record.unit)):
                same = any(map(known, text_members(record)))
                texts[record.unit] = texts.get(record.unit, False) or same
        if old := sum(texts.values()):
            says.append(
                f"{old} of {len(texts)} new patients have a text of {LONG} characters or more that "
                "somebody before them had; under a new key a patient's budget begins anew"
            )
    return "; ".join(says) or "no sign of a patient under two keys or in two datasets"


def _plan(study: Study, site: Site) -> str:
    """What `fedtune review` says of the plan, ledger and signature included."""
    plan = plan_for_site(study, site.site.declared_size) if study.private else None
    ledger = Ledger(site.site.state) if traces(site.site.state) else None  # a look begins none
    for refusal in would_refuse(study, site, plan, ledger):
        raise refusal
    if unsigned(study, site, ledger):
        raise PolicyRefused(
            'policy.admission = "signed" and nobody has signed this plan',
            todo="`fedtune review STUDY --site SITE --sign`",
        )
    return f"σ = {plan.noise_multiplier}, ε = {plan.epsilon:.3f}" if plan else "NOT PRIVATE"


def _fits(site: Site, study: Study, base: Base) -> str:
    check_data(site, study, base)
    return "usable"
