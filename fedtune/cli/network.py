"""Commands that make and end a site's membership in a consortium."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.exit_codes import Told, command
from fedtune.cli.study import SET

if TYPE_CHECKING:
    from fedtune.config import Site
    from fedtune.evidence.audit_log import AuditLog
    from fedtune.flower.enrol import Request

PANEL = "Between machines"
HOME = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", help="The coordinator's home. Without it: coordinator, here."
    ),
]

ANSWER = Annotated[
    Path | None,
    typer.Option("--answer", metavar="FILE", help="The coordinator's answer, to join with it."),
]
HEARD = Annotated[
    str | None,
    typer.Option(
        metavar="F",
        help="The consortium's, as the coordinator read it out. Without it: you are asked.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands on `app`."""
    for function in (enroll, admit, revoke, doctor):
        command(app, panel=PANEL)(function)


def enroll(
    site: Annotated[
        Path, typer.Argument(metavar="SITE", help="This site's site.toml.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The request. Without it: SITE-NAME.request."),
    ] = None,
    new_keys: Annotated[
        bool,
        typer.Option("--new-keys", help="Put the present keys aside and make new ones."),
    ] = False,
) -> dict[str, Any]:
    """Make this site's keys, here, and a request to take part that holds public halves alone.

    Send the file to the coordinator, and read the fingerprint out over the phone. Run again, it
    asks with the same keys: for a certificate that ran out while the client was off. Keys that are
    lost, stolen or due for rotation: the coordinator revokes the site, then --new-keys, then admit.
    The signing key stays: it belongs to the ledger."""
    return ask(site, out, new_keys=new_keys)


def ask(site: Path, out: Path | None = None, *, new_keys: bool = False) -> dict[str, Any]:
    """Make the keys that a site lacks and write its request, as `enroll` does."""
    from fedtune.config import load_site
    from fedtune.evidence.audit_log import AuditLog
    from fedtune.flower import enrol
    from fedtune.flower.membership import keys_folder
    from fedtune.ledger.ledger import Ledger
    from fedtune.wire import fingerprints

    loaded = load_site(site)
    keys = keys_folder(loaded)
    if new_keys and keys.exists():
        old = next(p for n in range(1, 1000) if not (p := Path(f"{keys}.old-{n}")).exists())
        keys.rename(old)
        typer.echo(f"put the present keys aside: {old}; delete them once the new ones are admitted")
    file = out or site.resolve().parent / f"{loaded.site.name}.request"
    book = Ledger(loaded.site.state)
    fingerprint = enrol.enroll(loaded.site.name, keys, book.key, file)
    peer = fingerprints.of_peer(book.key.public)
    rule = "--new-keys" if new_keys else ""
    AuditLog(book.folder, book.key).add("enroll", rule, fingerprint=fingerprint)
    typer.echo(
        f"wrote {file}: send it to the coordinator (it holds no secret)\n"
        f"fingerprint   {fingerprint}\n"
        f"to peers      {book.key.public}, fingerprint {peer}\n"
        "              (for a plan with [secure_aggregation]: each lists it in policy.peers)\n"
        "next   read the fingerprint out to the coordinator over the phone; then, with the answer\n"
        f"       that comes back: fedtune client {site} --answer {loaded.site.name}.answer"
    )
    own = {"key": book.key.public, "peer fingerprint": peer}
    return {"site": loaded.site.name, "request": file, "fingerprint": fingerprint, **own}


def _home(told: Path | None) -> Path:
    """The coordinator's home: where it is told, else beside the study.toml of this folder. A second
    one is never made by being in another folder. Errors: ConfigError."""
    home = told or Path("coordinator")
    if told is None and not home.is_dir() and not Path("study.toml").exists():
        from fedtune.errors import ConfigError

        raise ConfigError(
            f"{Path.cwd()}: no coordinator's home here",
            "`coordinator` beside study.toml, as `fedtune server` makes it",
            "go to the folder of study.toml, or give --home DIR",
        )
    return home


def _log(home: Path) -> AuditLog:
    from fedtune.evidence.audit_log import AuditLog
    from fedtune.wire.keys import SigningKey

    return AuditLog(home, SigningKey.at(home / "signing.key"))


ADMIT_REQUESTS = Annotated[
    list[Path],
    typer.Argument(metavar="REQUEST…", help="Sites' requests; one or several.", show_default=False),
]
ADMIT_FINGERPRINTS = Annotated[
    list[str] | None,
    typer.Option(
        "--fingerprint",
        metavar="F",
        help="As a site read it out; once for each request. Without it: you are asked.",
        show_default=False,
    ),
]
ADMIT_ADDRESS = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where sites connect. Without it: the server's."),
]
ADMIT_OUT = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="FILE", help="The answer to a single request. Without it: NAME.answer."
    ),
]


def admit(
    requests: ADMIT_REQUESTS,
    home: HOME = None,
    fingerprints: ADMIT_FINGERPRINTS = None,
    address: ADMIT_ADDRESS = None,
    out: ADMIT_OUT = None,
) -> dict[str, Any]:
    """Admit sites whose fingerprints you heard from somebody you know; write the answers they need.

    Each request's fingerprint is compared before any site is admitted. The server may be running:
    a site can connect at once, and its answer brings the study's plan for review. A name that is
    admitted already is refused with other keys: `fedtune revoke` it first (rotation, loss)."""
    from fedtune.errors import ConfigError
    from fedtune.files.writing import replace
    from fedtune.flower import enrol

    if out and len(requests) > 1:
        raise ConfigError("--out and several requests", "one request", "leave --out out")
    home, asked = _home(home), [enrol.read_request(path) for path in requests]
    _compare(asked, fingerprints)
    address = address or _address_in(home)
    answer, plans, files = None, True, dict[str, Path]()
    for request in asked:
        answer = enrol.admit(home, request, address)
        _log(home).add("admit", "--fingerprint", site=request.name, fingerprint=request.fingerprint)
        file = replace(out or Path(f"{request.name}.answer"), json.dumps(asdict(answer)).encode())
        plans, files[request.name] = plans and bool(answer.plan), file
        typer.echo(
            f"admitted {request.name}\nwrote {file}: send it to the site (it holds no secret)"
        )
    assert answer is not None  # typer wants one request at least
    if not plans:
        typer.echo(
            "no plan  the answers bring none for review: `fedtune server` has not made it as yet"
        )
    typer.echo(
        f"consortium   {answer.fingerprint}\n"
        "next   read this line out to each site, which asks for it at\n"
        "       fedtune client site.toml --answer FILE"
    )
    return {"answers": files, "fingerprint": answer.fingerprint, "plan": plans}


def _compare(asked: list[Request], heard: list[str] | None) -> None:
    """Compare every request's fingerprint with what the sites read out, before any is admitted.

    Errors: ConfigError where nobody did; Refused where one differs."""
    from fedtune.errors import ConfigError, Refused
    from fedtune.flower import enrol
    from fedtune.wire import fingerprints

    if heard:
        if len(heard) != len(asked):
            raise ConfigError(
                f"{len(heard)} fingerprints for {len(asked)} requests",
                "--fingerprint once for each request",
            )
        if len(asked) == 1:
            return enrol.compare(asked[0], heard[0])
        for request in asked:
            if not any(fingerprints.equal(request.fingerprint, one) for one in heard):
                raise Refused(
                    f"the fingerprint of {request.name}'s request is {request.fingerprint}",
                    "one of those that were read out",
                    "somebody may have replaced the file: ask the site to send it another way",
                )
        return
    for request in asked:
        typer.echo(
            f"the site {request.name} asks to take part\nfingerprint   {request.fingerprint}"
        )
        if not (sys.stdin.isatty() and typer.confirm("is this what the site read out to you?")):
            raise ConfigError(
                "not admitted: nobody compared the fingerprint",
                "a person who heard it from the site",
                "give it with --fingerprint",
            )


def _address_in(home: Path) -> str:
    """Read where sites connect from the coordinator's home. Errors: ConfigError."""
    from fedtune.errors import ConfigError
    from fedtune.files import reading

    file = home / "address"
    if not file.exists():
        raise ConfigError("it is not known where sites connect", todo="give --address HOST:PORT")
    return reading.text(file, "where sites connect", "give --address HOST:PORT").strip()


def join(site: Site, answer: Path | None, fingerprint: str | None) -> None:
    """Keep the coordinator's answer at this site, under the fingerprint that a person heard; None:
    the one that is kept already.

    On a terminal, and where this site has not joined this consortium before, the fingerprint is
    asked for; it is not shown. Errors: ConfigError, Refused."""
    from fedtune.errors import ConfigError
    from fedtune.evidence.audit_log import AuditLog
    from fedtune.flower import membership
    from fedtune.ledger.ledger import Ledger

    if answer is None:
        if fingerprint is not None:
            raise ConfigError("--fingerprint without --answer", todo="name the answer's file too")
        return
    if site.coordinator and site.coordinator.answer:
        raise ConfigError(
            f"--answer, and {site.coordinator.answer} in site.toml",
            "one of the two",
            "delete coordinator.answer and coordinator.fingerprint there",
        )
    keys, name = membership.keys_folder(site), site.site.name
    membership.read(answer, membership.tls_key(keys), name)
    known = membership.remembered(keys, name)
    if fingerprint is None and known is None and sys.stdin.isatty():
        fingerprint = typer.prompt("the consortium's fingerprint, as the coordinator read it out")
    joined = membership.join(answer, keys, name, fingerprint)
    book = Ledger(site.site.state)
    AuditLog(book.folder, book.key).add("join", "--answer", consortium=joined.fingerprint)
    typer.echo(f"joined the consortium {joined.fingerprint}, at {joined.address}")
    if joined.plan:
        typer.echo(f"plan   came with the answer: fedtune review {answer} --site {site.file}")


def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site.", show_default=False)],
    home: HOME = None,
) -> dict[str, Any]:
    """End a site's part, also in the middle of a run; its connections are closed within a second.

    Its keys are refused for good; new ones may be admitted under the same name."""
    from fedtune.flower import enrol

    record = enrol.revoke(_home(home), name)
    _log(_home(home)).add("revoke", site=name)
    typer.echo(f"revoked {name} at {record.revoked}; its keys are refused from now on")
    return {"name": name, "revoked": record.revoked}


DOCTOR_FILE = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A site's site.toml, or the coordinator's study.toml."),
]
DOCTOR_STUDY = Annotated[
    Path | None,
    typer.Option(
        "--study",
        metavar="STUDY",
        help="Site: also base, plan, records for it, and the self-test of the guarantee.",
    ),
]
DOCTOR_HOME = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Coordinator: its home. Without it: coordinator, beside FILE."
    ),
]
DOCTOR_HOST = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Coordinator: where it listens. As of `server`."),
]
DOCTOR_PORT = Annotated[
    int | None,
    typer.Option(min=1, max=65535, metavar="N", help="Coordinator: the port. As of `server`."),
]
DOCTOR_NAMES = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Coordinator: what sites call it by. Without it: what answers say.",
        show_default=False,
    ),
]


def doctor(
    file: DOCTOR_FILE,
    study: DOCTOR_STUDY = None,
    home: DOCTOR_HOME = None,
    host: DOCTOR_HOST = None,
    port: DOCTOR_PORT = None,
    names: DOCTOR_NAMES = None,
    settings: SET = None,
) -> dict[str, Any]:
    """Look for what could go wrong on this machine, before it does; say what to do about it.

    **At a site** (site.toml): records against the declared size, ledger, keys and
    certificate, the way to the coordinator, its names and its clock; with --study also the base,
    memory, the plan under the policy, and the self-test.

    **At the coordinator** (study.toml): plan, base, CA and certificate, names, clock, the
    port, and the registry of sites. Give it the options that `fedtune server` gets.

    Both: versions, disk, memory, who can read the secrets. No record leaves this machine."""
    from rich.console import Console
    from rich.markup import escape

    from fedtune.errors import ConfigError

    options = {"--study": study, "--home": home, "--host": host, "--port": port, "--name": names}
    coordinator = _kind(file) == "study"
    for option, value in options.items():
        if value is not None and (option == "--study") == coordinator:
            side = "a site" if option == "--study" else "the coordinator"
            raise ConfigError(
                f"{option} is for {side}, and {file} is not {side}'s file",
                todo=f"leave {option} out, or name the other file",
            )
    if settings and not (coordinator or study):
        raise ConfigError("--set: no study.toml is read", todo="name it with --study")
    if coordinator:
        from fedtune.server.doctor import Place
        from fedtune.server.doctor import examine as examine_coordinator

        place = Place(
            home or file.parent / "coordinator", host or "127.0.0.1", port or 8443, names or []
        )
        findings = examine_coordinator(file, place, settings or ())
    else:
        from fedtune.client.doctor import examine
        from fedtune.client.review import read_plan
        from fedtune.config import load_site

        plan = read_plan(study, load_site(file), settings or ()) if study else None
        findings = examine(file, plan)
    results = []
    for finding in findings:
        results.append(finding)
        mark = "[green]ok  [/green]" if finding.good else "[red]BAD [/red]"
        Console().print(f"{mark} {finding.name}: {escape(finding.says)}", highlight=False)
    if bad := sum(not finding.good for finding in results):
        counted = "1 check" if bad == 1 else f"{bad} checks"
        error = ConfigError(f"{counted} failed", todo="see above, then run it again")
        raise Told({"findings": results}, error)
    return {"findings": results}


def _kind(file: Path) -> str:
    """ "site" or "study", by the file's tables. Errors: ConfigError."""
    from fedtune.errors import ConfigError
    from fedtune.files import reading

    expected, todo = "a site.toml or a study.toml", "`fedtune init DIR` writes one of each"
    tables = reading.toml_in(file, expected, todo, ConfigError)
    for kind in ("site", "study"):
        if kind in tables:
            return kind
    raise ConfigError(f"{file}: neither a site.toml nor a study.toml", "a [site] or [study] table")
