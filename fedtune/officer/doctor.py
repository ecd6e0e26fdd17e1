"""Check a site before a study: files, ledger, certificates, network, plan, self-test.

Nothing leaves this machine except a status request to the site's own coordinator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from fedtune.core.bases.find import Base, cache_dir, find_base
from fedtune.core.config import Site, Study, load_site
from fedtune.core.config.database import FILES, file_of, kind_of
from fedtune.core.config.hospital import FILE
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.config.sheet import list_lacking, load_sheet
from fedtune.core.data.declared_size import describe_wrong_size
from fedtune.core.data.load import LONG, text_members
from fedtune.core.data.records import read_file, read_records, unit_member
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, PolicyRefused
from fedtune.core.ledger.adopted import check_has_adopted
from fedtune.core.ledger.files import KEY, SALT
from fedtune.core.ledger.patient_column import check_column_stays, describe_withdrawn_before
from fedtune.core.models.build import build
from fedtune.core.progress import report
from fedtune.core.training import selftest
from fedtune.core.vault.declared import declare
from fedtune.core.vault.policy import base_for, compute_within_limits
from fedtune.core.vault.reading import (
    by_reason,
    describe,
    read_for_training,
    rows_of,
)
from fedtune.core.wire.protocol import check_peer
from fedtune.doctor import machine, tls
from fedtune.doctor.machine import Finding, findings
from fedtune.flower import certs
from fedtune.flower.forwarder import STATUS, dial, far_context, find_newest_certificate, proxy_of
from fedtune.flower.link import Link, link
from fedtune.flower.membership import keys_folder
from fedtune.homes.opening import find_ledger
from fedtune.officer.isolation_here import isolation_here
from fedtune.officer.let_go import list_waiting
from fedtune.officer.memberships import list_memberships
from fedtune.officer.reading import check_data, reading_of
from fedtune.officer.review import find_coordinator, is_unsigned, unchecked, would_refuse
from fedtune.officer.shared_files import find_shared_files
from fedtune.officer.sheet import check_attested
from fedtune.officer.step_log import check_step_log
from fedtune.report.delta import warning

RENEW = (
    "a running `fedtune client` renews it by itself; past its end run `fedtune enroll` again, with "
    "the same keys, and have the request admitted"
)


def examine(
    path: Path, study: Study | None = None, *, outline: bool = False, coordinator: str = ""
) -> Iterator[Finding]:
    """Check a site, and yield each check's finding as the check ends. If a study is given, also
    check its plan and the data, and run the self-test.

    - path: the site.toml
    - study: the plan that the site would take part in; None checks the site alone
    - outline: whether the plan is an outline: digests that are filled in when the study starts may
      be missing
    - coordinator: the public key of the coordinator that sends the plan; "" stands for the
      coordinator of the consortium that the site has joined, if any

    Errors: ConfigError if site.toml cannot be read; everything else is a finding."""
    site = load_site(path)
    yield Finding("site file", True, f"{path}: {site.site.name}")
    if study is not None:  # first: it takes a second, and the other checks take minutes
        yield from findings([("plan", lambda: _plan(study, site, outline, coordinator))])
    yield from findings(
        [
            ("versions", machine.versions),
            ("records", lambda: _records(site)),
            ("ledger", lambda: _ledger(site)),
            ("same people", lambda: _same_people(site)),
            ("secrets", lambda: _secrets(site)),
            ("isolation", lambda: _isolation(site)),
        ]
    )
    if site.hospital:
        yield from findings([("home", lambda: _home(site))])
    if site.data.declared:
        yield from findings([("declared data", lambda: _check_declared(site))])
    if site.policy.answers == "held":
        yield from findings([("held answers", lambda: _count_held(site))])
    if site.policy.data_sheet:
        yield from findings([("data sheet", lambda: _sheet(site))])
    if study is None:
        yield from findings([("disk", lambda: _disk(site, machine.FREE))])
    if site.coordinator:
        yield from _network(site, path)
    if study is not None:
        yield from _for_study(site, study)


def _home(site: Site) -> str:
    """Check that nobody else can change hospital.toml or its folder, the hospital's home, and that
    each membership's site file can be used. Return a text that says so. Errors: ConfigError, which
    names every problem."""
    listed = list_memberships(site.home)
    open_ = [
        f"{path}: other users can change it"
        for path in (site.home / FILE, site.home)
        if path.stat().st_mode & 0o022
    ]
    broken = [f"{each.name}: {each.problem}" for each in listed.memberships if each.problem]
    if open_ or broken:
        raise ConfigError(
            "; ".join([*open_, *broken]),
            "a home for this user alone, and a site file for each membership",
            "chmod go-w; correct the path in hospital.toml, or `fedtune memberships HOME --end`",
        )
    names = ", ".join(each.name for each in listed.memberships)
    return f"{site.home}: for this user alone to change; memberships: {names}"


def _isolation(site: Site) -> str:
    """Return a text that says how `fedtune client` would be confined here. Errors: PolicyRefused if
    the policy asks for more than this machine supports."""
    here = isolation_here(site)
    if here.lacks and site.policy.isolation == "required":
        raise PolicyRefused(
            f'policy.isolation = "required", but on this machine {"; ".join(here.lacks)}',
            todo='run the client elsewhere, or set policy.isolation = "preferred"',
        )
    return here.text


def _disk(site: Site, least: float) -> str:
    """Check the free space of the state folder's disk. Return a text that states it, and whether
    records lie on the disk too. least: the number of bytes that must be free.

    A coordinator can see how much space is free beside the ledger's room (docs/guarantee.md, "What
    it does not cover"). If the records or their cache lie on the same disk, that space reveals how
    long the records are."""
    text = machine.disk(site.home, least)
    of_records = {"records": _records_file(site), "FEDTUNE_CACHE": cache_dir()}
    state = _device(site.home)
    on_it = [name for name, path in of_records.items() if path and _device(path) == state]
    if not on_it or not site.coordinator:
        return text
    return f"{text}; {' and '.join(on_it)} on the same disk: its free space tells how long they are"


def _records_file(site: Site) -> Path | None:
    """Return the file or folder of the records; None if they are in a database server."""
    if site.data.url is None:
        return site.data.path
    return file_of(site.data.url) if kind_of(site.data.url) in FILES else None


def _device(path: Path) -> int:
    """Return the number of the file system of a path, or of its nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _count_held(site: Site) -> str:
    """Return a text with the number of answers that wait for a person here."""
    count = len(list_waiting(site))
    told = f"{count} wait: `fedtune let-go`" if count else "none waits"
    return f"each waits here until a person lets it go (policy.answers); {told}"


def _check_declared(site: Site) -> str:
    """Check that no declared record was ever charged as private, as the client does at its start.
    Return a text that says which ledger pays for the records.

    Errors: PolicyRefused."""
    if find_ledger(site.home):
        declare(site, sign=False)
    allowed = site.policy.allow_declared_data
    client = "" if allowed else "; `fedtune client` refuses it (policy.allow_declared_data)"
    return f"{site.data.declared}: a run of it pays from a ledger of its own{client}"


def _sheet(site: Site) -> str:
    """Check that the data sheet has the fields that the policy requires, and that it was attested
    for these records; return a text that says so.

    Errors: PolicyRefused."""
    lacks = list_lacking(load_sheet(site), site.policy.data_sheet)
    if lacks:
        raise PolicyRefused(f"policy.data_sheet: the data sheet lacks {', '.join(lacks)}")
    check_attested(site)
    return "holds what policy.data_sheet asks for; sheet and records are as they were attested"


def _for_study(site: Site, study: Study) -> Iterator[Finding]:
    report("checking: base")
    try:
        base = find_base(study.base.model) if study.base.digest is None else base_for(study, site)
        need = machine.need(study, base.path)
    except FedtuneError as error:
        yield Finding("base", False, str(error))
        return
    outbox_bytes = need.adapter * (study.training.rounds or 0)  # every update stays in the outbox
    yield Finding("base", True, f"{base.path}: {base.digest}")
    yield from findings(
        [
            ("disk", lambda: _disk(site, machine.FREE + outbox_bytes)),
            ("memory", lambda: machine.memory(need.memory)),
            ("records for the plan", lambda: _fits(site, study, base)),
        ]
    )
    report("loading the base")
    try:
        if study.private:
            compute_within_limits(study, site)  # refuses a plan that takes the self-test for ever
        network = build(study, base)
    except FedtuneError as error:
        yield Finding("self-test", False, str(error))
        return
    rank = study.lora.rank_at(site.site.lora_rank) if study.lora else None
    for result in selftest.run(study, network, site.site.declared_size, rank):
        detail = result.note or f"{result.figure:.3g}, at most {result.bound:g}"
        yield Finding(f"self-test: {result.name}", result.passed, detail)


def _network(site: Site, path: Path) -> Iterator[Finding]:
    """Check the site's enrolment, its certificate and the gateway's, and whether the gateway
    answers and lets the site in, and yield a finding for each. If a check fails without which the
    next ones are impossible, the checks end there. path: the site file."""
    report("checking: coordinator")
    try:
        site_link = link(site, path)
        answer = site_link.answer
        authority = x509.load_pem_x509_certificate(answer.ca.encode())
        leaf = find_newest_certificate(site_link)
    except FedtuneError as error:
        yield Finding("enrolment", False, str(error))
        return
    yield Finding("enrolment", True, f"{site_link.name}, in the consortium {answer.fingerprint}")
    check = lambda: tls.certificate(leaf, authority, tls.LEAF_LEFT, RENEW)  # noqa: E731
    yield from findings([("certificate", check)])
    try:
        proxy = proxy_of(site_link)
        connect = lambda context: dial(site_link, proxy, context)  # noqa: E731
        server_leaf = tls.fetch_certificate(connect, site_link.address)
    except FedtuneError as error:
        yield Finding("coordinator", False, str(error))
        return
    advice = "check the address; if it is right, ask the coordinator to run `fedtune doctor`"
    yield from findings(
        [
            ("names", lambda: tls.names(server_leaf, site_link.host)),
            (
                "its certificate",
                lambda: tls.certificate(server_leaf, authority, timedelta(0), advice),
            ),
        ]
    )
    try:
        status, clock = _greet(site_link, connect)
    except FedtuneError as error:
        yield Finding("coordinator", False, str(error))
        return
    yield Finding("coordinator", True, f"{site_link.address}: answers, and lets this site in")
    yield from findings(
        [("clock", lambda: tls.clock(clock)), ("protocol", lambda: _protocol(status))]
    )


def _greet(site_link: Link, connect: tls.Dial) -> tuple[dict[str, Any], float]:
    """Return the gateway's status, and by how many seconds this machine's clock is ahead of the
    gateway's. site_link: the site's connection to its coordinator. connect: opens a connection to
    the gateway.

    Errors: InfrastructureError if the gateway does not answer, or refuses this site."""
    sent = certs.read_clock()
    code, body = tls.get(connect, far_context(site_link), site_link.address, STATUS)
    received = certs.read_clock()
    if code == 403:
        raise InfrastructureError(f"{site_link.address}: refuses this site: {body.decode()}")
    if code != 200:
        raise InfrastructureError(f"{site_link.address}: answers {code}: {body.decode()}")
    status: dict[str, Any] = json.loads(body)
    gateway_time = str(status.get("now", received.isoformat()))
    return status, tls.ahead_of(sent, gateway_time, received)


def _protocol(status: dict[str, Any]) -> str:
    check_peer("the coordinator", status, "this site")
    return f"{status['protocol']} at both ends; fedtune {status['release']} at the coordinator"


def _secrets(site: Site) -> str:
    keys = keys_folder(site)
    own = [] if site.home == site.site.state else [site.site.state / KEY]
    return machine.secrets(
        [*own, site.home / KEY, site.home / SALT, keys / "node.key", keys / "tls.key"]
    )


def _records(site: Site) -> str:
    """Compare the number of usable units with site.declared_size, and return both numbers as text.
    Errors: FedtuneError if there are fewer than 2 units, or if the two numbers differ by a factor
    of two or more."""
    by_patient = site.data.columns.patient is not None
    read = read_file(site.data, unit="patient" if by_patient else "record")
    units = len({record.unit for record in read.records})
    unit, declared = "patients" if by_patient else "records", site.site.declared_size
    counts = f"{len(read.records)} usable records, {units} {unit}; declared_size = {declared}"
    if read.filtered:
        counts += f"; {read.filtered} left out by data.filter"
    if read.withheld:
        counts += f"; {read.withheld} of patients who did not agree to their use"
    if read.failed:
        counts += f"; left out: {by_reason(read.rejected)}: {rows_of(read.failed)}"
    shared = find_shared_files(read.records, "patient" if by_patient else "record")
    if shared.count:
        counts += f"; WARNING: {shared}: {rows_of(shared.rows)}"
    if units < 2:
        raise FedtuneError(
            counts,
            "at least 2 units, because with fewer this site sends noise only",
            "add records, or check [data] in site.toml",
        )
    if not declared / 2 < units < 2 * declared:
        raise FedtuneError(
            counts,
            "a declared size within a factor of two",
            "choose another round figure for site.declared_size, which is public",
        )
    return "; ".join([counts, *describe_wrong_size(units, declared, unit.removesuffix("s"))])


def _ledger(site: Site) -> str:
    ledger = find_ledger(site.home)
    if site.hospital:
        check_has_adopted(site.site.state, ledger)
    if ledger is None:
        return f"{site.home}: none yet; begins with the first study"
    ledger.verify()
    check_step_log(site)
    for table in filter(None, (site.data, site.evaluation)):
        if not table.declared:
            unit = "patient" if table.columns.patient else "record"
            check_column_stays(ledger, site, table.name, unit, at_site=True)
    said = describe_withdrawn_before(ledger, patient_columns(site))
    return f"{site.home}: whole; {len(ledger.spending())} charges" + (said and f"; {said}")


def _same_people(site: Site) -> str:
    """Look for signs that one patient has two keys, and that datasets which are declared disjoint
    share patients or records. Return a text that lists the signs, or says that there is none.

    The guarantee covers neither case. Boilerplate texts cause both signs, so a person has to
    judge."""
    if (ledger := find_ledger(site.home)) is None:
        return "nobody has taken part here as yet"
    data = site.data
    signs = [
        f"datasets {first} and {second} are declared disjoint and share {shared} patients, records "
        "or longer texts"
        for first, second in ledger.disjoint
        if (shared := ledger.overlap(first, second))
    ]
    if data.columns.patient:
        is_known_member, texts = ledger.member_test(data.name), dict[str, bool]()
        for record in read_records(data, unit="patient", strict=False)[0]:
            if not is_known_member(unit_member(record.unit)):
                has_known_text = any(map(is_known_member, text_members(record)))
                texts[record.unit] = texts.get(record.unit, False) or has_known_text
        if old := sum(texts.values()):
            signs.append(
                f"{old} of {len(texts)} new patients have a text of {LONG} characters or more that "
                "somebody before them had; under a new key a patient's budget begins anew"
            )
    return "; ".join(signs) or "no sign of a patient under two keys or in two datasets"


def _plan(study: Study, site: Site, outline: bool, coordinator: str) -> str:
    """Check the plan against policy, ledger and signatures, as `fedtune review` does, and return σ
    and ε as text. outline, coordinator: as for `examine`. Errors: the first refusal."""
    plan = compute_within_limits(study, site) if study.private else None
    ledger = find_ledger(site.home)  # a check creates none
    coordinator = coordinator or find_coordinator(site)
    for refusal in would_refuse(
        study, site, plan, ledger, outline=outline, coordinator=coordinator
    ):
        raise refusal
    if is_unsigned(study, site, ledger):
        raise PolicyRefused(
            f'policy.admission = "{site.policy.admission}" and nobody has signed this plan',
            todo="`fedtune review STUDY --site SITE --sign`",
        )
    told, warned = "NOT PRIVATE", ""
    if plan is not None:
        told = f"σ = {plan.noise_multiplier}, ε = {plan.epsilon:.3f}"
        warned = warning(plan.delta, plan.unit, site.site.declared_size)
    return "; ".join(filter(None, [told, warned, unchecked(site, coordinator)]))


def _fits(site: Site, study: Study, base: Base) -> str:
    """Check that the site's records fit the study. Return a text that says how the study would use
    the rows, and which rows it rejects. base: the study's base, which is on this machine. Errors:
    DataError if the records do not fit."""
    check_data(site, study, base)
    tokenizer, reader = reading_of(base, study.base.modality)
    ledger = find_ledger(site.home)  # a check creates none
    dataset = read_for_training(site.data, study, tokenizer, reader, ledger)
    parts = [describe(dataset, study, site.site.declared_size), rows_of(dataset.counts.failed)]
    return "; ".join(filter(None, parts))
