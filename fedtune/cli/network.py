"""Commands by which a site joins a consortium, and by which the coordinator removes it."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.exit_codes import command
from fedtune.core.errors import escape_controls

if TYPE_CHECKING:
    from fedtune.core.config import Site, Study
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.ledger.ledger import Ledger
    from fedtune.flower.enrol import Answer, Request

PLAN_SECONDS = 0.5  # pause between two checks whether the server has made its plan
HOME = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="The coordinator's home. Default: the folder named coordinator in the current folder.",
    ),
]

ANSWER = Annotated[
    Path | None,
    typer.Option(
        "--answer",
        metavar="FILE",
        help="Join the consortium with this answer, which `fedtune admit` wrote, then start. "
        "Needed once.",
    ),
]
HEARD = Annotated[
    str | None,
    typer.Option(
        metavar="F",
        help="With --answer: the coordinator's fingerprint, as it was read out to you. "
        "Default: on a terminal you are asked for it.",
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (enroll, admit, revoke, leave):
        command(app, panel=panel)(function)


def enroll(
    site: Annotated[
        Path, typer.Argument(metavar="SITE", help="This site's site.toml.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The file to write the request to. Default: NAME.request beside SITE, with the "
            "site's name as NAME.",
        ),
    ] = None,
    new_keys: Annotated[
        bool,
        typer.Option(
            "--new-keys",
            help="Put the present network keys aside and make new ones. The signing key stays.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Make this site's keys, and a request to take part that holds their public halves only.

    Send the file to the coordinator, and read the fingerprint out over the phone. If a certificate
    expired while the client was off, run this command again: the new request has the same keys. If
    network keys are lost, stolen or due for rotation, the coordinator revokes the site, you run
    this command with --new-keys, and the coordinator admits the new request. --new-keys leaves the
    signing key, which belongs to the ledger."""
    return ask(site, out, new_keys=new_keys)


def ask(site: Path, out: Path | None = None, *, new_keys: bool = False) -> dict[str, Any]:
    """Make the keys that a site lacks, write its request to take part, and print what to do next.

    - site: the path of the site file
    - out: the file to write; None for NAME.request beside the site file
    - new_keys: whether the present network keys are put aside first and made anew

    Returns: a dict with the site's name, the request's path and fingerprint, and the public signing
    key with the fingerprint by which peers (sites that share noise with this one) compare it."""
    from fedtune.core.config import load_site
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.ledger.ledger import signing_key
    from fedtune.evidence import fingerprints
    from fedtune.flower import enrol
    from fedtune.flower.membership import keys_folder
    from fedtune.homes.opening import open_ledger

    loaded = load_site(site)
    book = open_ledger(loaded.home)
    keys = keys_folder(loaded)
    file = out or site.resolve().parent / f"{loaded.site.name}.request"
    enrol.check_out(file, enrol.REQUEST, "request")  # before keys are put aside
    if new_keys and keys.exists():
        old = next(p for n in range(1, 1000) if not (p := Path(f"{keys}.old-{n}")).exists())
        keys.rename(old)
        typer.echo(f"put the present keys aside: {old}; delete them once the new ones are admitted")
    key = signing_key(loaded, book)
    fingerprint = enrol.enroll(loaded.site.name, keys, key, file)
    peer = fingerprints.of_peer(key.public)
    rule = "--new-keys" if new_keys else ""
    AuditLog(book.folder, book.key).add("enroll", rule, fingerprint=fingerprint)
    typer.echo(
        f"wrote {file}: send it to the coordinator (it holds no secret)\n"
        f"fingerprint   {fingerprint}\n"
        "              this is OURS: read it out to the coordinator over the phone\n"
        "next   the answer comes back, and the coordinator reads its own fingerprint out to you:\n"
        f"       fedtune client {site} --answer {loaded.site.name}.answer asks for it, to compare\n"
        "only for a plan with [secure_aggregation], to the other sites, not to the coordinator:\n"
        f"to peers      {key.public}, fingerprint {peer}\n"
        "              (each lists the key in policy.peers)"
    )
    own = {"key": key.public, "peer fingerprint": peer}
    return {"site": loaded.site.name, "request": file, "fingerprint": fingerprint, **own}


def _home(told: Path | None) -> Path:
    """Return the coordinator's home: `told`, or else the folder `coordinator` in the current
    folder. Errors: ConfigError if the current folder has neither that folder nor a study.toml, so
    that a command in a wrong folder never makes a second home."""
    home = told or Path("coordinator")
    if told is None and not home.is_dir() and not Path("study.toml").exists():
        from fedtune.core.errors import ConfigError

        raise ConfigError(
            f"{Path.cwd()}: no coordinator's home here",
            "`coordinator` beside study.toml, as `fedtune server` makes it",
            "go to the folder of study.toml, or give --home DIR",
        )
    return home


def _log(home: Path) -> AuditLog:
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.wire.keys import SigningKey

    return AuditLog(home, SigningKey.at(home / "signing.key"))


ADMIT_REQUESTS = Annotated[
    list[Path],
    typer.Argument(
        metavar="REQUEST…",
        help="The files that `fedtune enroll` wrote at one or several sites.",
        show_default=False,
    ),
]
ADMIT_FINGERPRINTS = Annotated[
    list[str] | None,
    typer.Option(
        "--fingerprint",
        metavar="F",
        help="The fingerprint that a site read out; give it once for each request. Default: "
        "on a terminal you are asked to compare.",
        show_default=False,
    ),
]
ADMIT_ADDRESS = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The address to which sites connect. Default: the one that `fedtune server` "
        "noted in the home.",
    ),
]
ADMIT_OUT = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="The file to write the answer to, if there is one request. Default: NAME.answer "
        "in the current folder.",
    ),
]


def admit(
    requests: ADMIT_REQUESTS,
    home: HOME = None,
    fingerprints: ADMIT_FINGERPRINTS = None,
    address: ADMIT_ADDRESS = None,
    out: ADMIT_OUT = None,
) -> dict[str, Any]:
    """Admit sites whose fingerprints you heard from somebody you know, and write their answers.

    Each request's fingerprint is compared before any site is admitted. While a server makes its
    plan, this command waits for it, because the answers hold the plan for review. Afterwards an
    admitted site can connect at once. If a name is admitted already, other keys under this name are
    refused until `fedtune revoke` has removed the site."""
    from fedtune.core.errors import ConfigError
    from fedtune.core.files.writing import replace
    from fedtune.flower import enrol

    if out and len(requests) > 1:
        raise ConfigError(
            "--out is given for several requests",
            "a single request with --out",
            "leave --out out, or admit the requests one by one",
        )
    home, asked = _home(home), [enrol.read_request(path) for path in requests]
    files = {request.name: out or Path(f"{request.name}.answer") for request in asked}
    for file in files.values():
        enrol.check_out(file, enrol.ANSWER, "answer")
    _compare(asked, fingerprints)
    _wait_for_plan(home)
    address = address or _address_in(home)
    answer, plans = None, True
    for request in asked:
        answer = enrol.admit(home, request, address)
        _log(home).add("admit", "--fingerprint", site=request.name, fingerprint=request.fingerprint)
        file = replace(files[request.name], json.dumps(asdict(answer)).encode())
        plans = plans and bool(answer.plan)
        typer.echo(
            f"admitted {request.name}\nwrote {file}: send it to the site (it holds no secret)"
        )
    assert answer is not None  # typer wants one request at least
    if not plans:
        typer.echo(
            "no plan  the answers bring none for review: no `fedtune server` runs here. Start it, "
            "and run this\n         command again when it says next. A site that joins without the "
            "plan reviews it once\n         its client has received it"
        )
    typer.echo(
        f"consortium   {answer.fingerprint}\n"
        "             this is OURS: read it out to each site over the phone\n"
        "next   fedtune client site.toml --answer FILE at each site asks for it, to compare"
    )
    return {"answers": files, "fingerprint": answer.fingerprint, "plan": plans}


def _wait_for_plan(home: Path) -> None:
    """Wait while a server that runs in this home still makes the plan, which the answers to sites
    have to hold. After Ctrl-C nobody is admitted."""
    from fedtune.flower.enrol import PLAN
    from fedtune.observe.status import held

    told = False
    while not (home / PLAN).exists() and held(home / "flower" / "lock"):
        if not told:
            typer.echo(
                "waiting  for the plan, which `fedtune server` is making: the answers bring it. "
                "Ctrl-C: nobody is\n         admitted, and the same command goes on later"
            )
        told = True
        time.sleep(PLAN_SECONDS)


def _compare(asked: list[Request], heard: list[str] | None) -> None:
    """Compare every request's fingerprint with those that the sites read out, before any site is
    admitted.

    heard: the values of --fingerprint; without any, a person is asked on the terminal. Errors:
    ConfigError if nobody compared a fingerprint; Refused if one differs."""
    from fedtune.core.errors import ConfigError, Refused
    from fedtune.evidence import fingerprints
    from fedtune.flower import enrol

    if heard:
        if len(heard) != len(asked):
            raise ConfigError(
                f"{len(heard)} fingerprints for {len(asked)} requests",
                "--fingerprint once for each request",
            )
        if len(asked) == 1:
            return enrol.compare(asked[0], heard[0])
        for request in asked:
            if not any(fingerprints.match_fingerprints(request.fingerprint, one) for one in heard):
                raise Refused(
                    f"the fingerprint of {request.name}'s request is {request.fingerprint}",
                    "one of those that were read out",
                    "somebody may have replaced the file: ask the site to send it another way",
                )
        return
    for request in asked:
        typer.echo(
            f"the site {request.name} asks to take part\nfingerprint   {request.fingerprint}\n"
            f"              this is THEIRS, as the file has it: compare it with what "
            f"{request.name} reads out to you"
        )
        if not (sys.stdin.isatty() and typer.confirm("is it the same, all of it?")):
            raise ConfigError(
                "nobody compared the fingerprint, so the site is not admitted",
                "a person who heard it from the site",
                "give it with --fingerprint",
            )


def _address_in(home: Path) -> str:
    """Read, from the file `address` in the coordinator's home, the address to which sites connect.
    Errors: ConfigError if there is no such file."""
    from fedtune.core.errors import ConfigError
    from fedtune.core.files import reading

    file = home / "address"
    if not file.exists():
        raise ConfigError(
            "the address to which sites connect is not known", todo="give --address HOST:PORT"
        )
    return reading.text(file, "where sites connect", "give --address HOST:PORT").strip()


def join(site: Site, answer: Path | None, fingerprint: str | None) -> None:
    """Join a consortium: compare the coordinator's answer with the fingerprint that a person heard,
    and store the answer at this site.

    - answer: the answer's file; None: nothing is done, and an answer that was stored before stays
      in force
    - fingerprint: the fingerprint that the person heard; None: it is asked for on a terminal, if
      this site has no stored answer yet

    Whoever gives the fingerprint also signs the plan in the answer, unless the policy asks for
    `fedtune review --sign` or refuses the plan. Errors: ConfigError, Refused."""
    from fedtune.core.errors import ConfigError

    if answer is None:
        if fingerprint is not None:
            raise ConfigError(
                "--fingerprint is given without --answer", todo="name the answer's file too"
            )
        return  # nothing that reads a ledger is imported: this process stays as long as the site
    from fedtune.core.ledger.audit_log import AuditLog, login
    from fedtune.core.vault.waiting_plans import keep_plan
    from fedtune.flower import membership
    from fedtune.homes.opening import open_ledger
    from fedtune.officer.leave import check_trusted

    if site.coordinator and site.coordinator.answer:
        raise ConfigError(
            f"an answer is named by --answer and by {site.coordinator.answer} in site.toml",
            "only one of the two",
            "delete coordinator.answer and coordinator.fingerprint in site.toml",
        )
    keys, name = membership.keys_folder(site), site.site.name
    received = membership.read(answer, membership.tls_key(keys), name)
    known, book = membership.load_answer(keys, name), open_ledger(site.home)
    check_trusted(book.folder, received.fingerprint)
    signable = _show_plan(site, answer, received, book)
    if fingerprint is None and known is None and sys.stdin.isatty():
        fingerprint = typer.prompt("the coordinator's fingerprint, as it was read out to you")
    joined, acts = membership.join(answer, keys, name, fingerprint), AuditLog(book.folder, book.key)
    acts.add("join", "--answer", consortium=joined.fingerprint)
    typer.echo(f"joined the consortium {joined.fingerprint}, at {joined.address}")
    if signable is None or site.policy.admission == "signed":
        return
    if book.admitted(signable.digest, site.policy.own_memberships):
        return
    if fingerprint is None:
        typer.echo("plan   not signed by joining again: fedtune review signs it, with --sign")
        return
    acts.add("sign", "--answer", plan=signable.digest, study=signable.study.name)
    book.admit(signable.digest, login(), site.policy.membership)
    keep_plan(site, signable)
    typer.echo(f"signed by {login()}: the plan in the answer, and no other")


def _show_plan(site: Site, answer: Path, received: Answer, book: Ledger) -> Study | None:
    """Print what the plan in a coordinator's answer would cost, and whether joining signs it.
    Return the plan if this site's rules allow it; None if they refuse it, or if the answer holds no
    plan.

    - answer: the path of the answer's file
    - received: its content
    - book: the site's ledger, by which the cost is computed"""
    from fedtune.core.errors import FedtuneError
    from fedtune.flower import membership
    from fedtune.officer.review import review

    if not received.plan:
        typer.echo("plan   none came with the answer; it is shown when the coordinator sends it")
        return None
    try:
        study = membership.plan_of(received, answer)
        assert study is not None  # there is a text
        seen = review(study, site, book, coordinator=received.coordinator)
    except FedtuneError as error:
        typer.echo(
            f"plan   came with the answer, and this site refuses it: {escape_controls(str(error))}"
        )
        return None
    rule, typed = site.policy.admission, "typing the coordinator's fingerprint signs it"
    does = {
        "standing": f"{typed}; further plans run by this site's rules alone",
        "reviewed": f"{typed}; a further plan waits until somebody signs it",
        "signed": "it waits until somebody signs it, with fedtune review and --sign",
    }[rule]
    if seen.refusals:
        does = "joining does not sign it, since this site refuses it"
    typer.echo(f"plan   {study.study.name} came with the answer:")
    for line in (
        *dict(seen.sections)["What it costs"],
        *seen.refusals,
        f'policy.admission = "{rule}": {does}.',
    ):
        typer.echo(textwrap.indent(textwrap.fill(escape_controls(line), 89), " " * 7))
    typer.echo(f"       in full: fedtune review {answer} --site {site.file}")
    return None if seen.refusals else study


def revoke(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the site.", show_default=False)
    ],
    home: HOME = None,
) -> dict[str, Any]:
    """Remove a site, even in the middle of a run; its connections are closed within a second.

    Its keys are refused for good; new keys may be admitted under the same name."""
    from fedtune.flower import enrol

    record = enrol.revoke(_home(home), name)
    _log(_home(home)).add("revoke", site=name)
    typer.echo(f"revoked {name} at {record.revoked}; its keys are refused from now on")
    return {"name": name, "revoked": record.revoked}


def leave(
    site: Annotated[
        Path, typer.Argument(metavar="SITE", help="This site's site.toml.", show_default=False)
    ],
    distrust: Annotated[
        bool,
        typer.Option(
            "--distrust",
            help="Never join this consortium again: its coordinator's key was lost or stolen, or "
            "the coordinator lied.",
        ),
    ] = False,
) -> dict[str, Any]:
    """Leave a consortium: delete this site's network keys and the coordinator's answer.

    Stop the client first. The coordinator need not agree or answer; tell the coordinator, so that
    `fedtune revoke` there refuses the deleted keys. Charges, releases and log entries stay. Studies
    under way end for this site, and `fedtune purge` deletes what they left."""
    from fedtune.core.config import load_site
    from fedtune.officer.leave import leave as go

    left = go(load_site(site, keys_may_differ=True), distrust=distrust)
    named = f"the consortium {left.consortium}" if left.consortium else "a consortium never joined"
    typer.echo(f"left {named}; {left.files} files of keys and certificates are deleted")
    for name in left.studies.values():
        typer.echo(f"ended here, for this site: {name}")
    if distrust:
        typer.echo("no answer of that consortium is taken any more")
    return asdict(left)
