"""The coordinator: `fedtune server`, which runs a study over TLS with sites on other machines.

    serve() ── starts ──> SuperLink (TLS, node keys, one port) <── site ── `fedtune client`
       └── claims the run's ServerApp task and calls server.rounds.run with its Grid

The rounds run in this process, from the installed package. The app bundle that Flower wants for a
run holds a pyproject.toml and no code, so there is nothing in it that a site could run.

Layout of the coordinator's home:

    ca.crt, server.crt, server.key   make_ca and make_server_certificate write them (certs.py)
    signing.key                      signs plans, orders and receipts; made at the first start
    nodes/SITE.pub                   the public key of every site that may take part
    flower/                          state of the running SuperLink; made anew at every start

Known limit: Flower serves its Fleet API (sites) and its Control API (who may start and stop runs)
on one port, and the Control API asks for no credentials. On the default host, 127.0.0.1, only this
machine reaches it. On any other host whoever reaches the port can start a run of their own: sites
still run their installed code alone, under their own policy, but let a firewall or a reverse proxy
that forwards /v1/fleet/ and nothing else stand in front of it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import secrets
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from flwr.serverapp import Grid

from fedtune.config import load_study
from fedtune.errors import ConfigError, InfrastructureError
from fedtune.flower import api
from fedtune.flower.certs import read_public_key
from fedtune.flower.processes import (
    Child,
    Stopped,
    bypass_proxy,
    interruptible,
    reachable,
    write_private,
)
from fedtune.wire.keys import SigningKey

Event = Callable[[str, dict[str, Any]], None]
Run = Callable[..., dict[str, Any]]  # server.rounds.run, or a stand-in
CLAIM_SECONDS = 30.0


def serve(
    study_path: Path,
    out: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    home: Path,
    resume: bool = False,
    on_event: Event | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Run the study with the sites whose keys are in home/nodes; return the report's body.

    host, port: where the SuperLink listens (see the known limit above). run: in place of
    server.rounds.run. Errors: ConfigError; InfrastructureError when the SuperLink ends, cannot
    listen, or when a signal stops the study."""
    study = load_study(study_path)
    keys = read_nodes(home)
    rounds = run or _installed_rounds(home)
    bypass_proxy()
    try:
        with interruptible(), superlink(home, host, port) as link:
            name, ca = _own_name(host), (home / "ca.crt").read_bytes()
            address = f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
            try:
                with study_grid(link, address, ca, keys, _secret(home).read_bytes()) as grid:
                    return rounds(grid, study, out, resume=resume, on_event=on_event)
            except (httpx.HTTPError, InfrastructureError) as error:
                raise _blame(link, error) from None
    except Stopped as stop:
        raise InfrastructureError(
            f"stopped by {stop.name} before the study was done", todo="start it with --resume"
        ) from None


def read_nodes(home: Path) -> dict[str, bytes]:
    """The sites that may take part: name (the file's) -> public key, PEM. Errors: ConfigError."""
    files = sorted((home / "nodes").glob("*.pub"))
    if not files:
        raise ConfigError(
            f"{home / 'nodes'} holds no site's key",
            "one SITE.pub for each site",
            "ask every site for its public key",
        )
    return {file.stem: read_public_key(file) for file in files}


@contextmanager
def superlink(home: Path, host: str, port: int) -> Iterator[Child]:
    """A SuperLink that listens with TLS, admits registered nodes only, and starts no process.

    Its database is new each time: what must outlive it is in the study's own folder."""
    for name in ("ca.crt", "server.crt", "server.key"):
        if not (home / name).is_file():
            raise ConfigError(f"{home / name}: no such file", todo="make_server_certificate")
    if reachable(_own_name(host), port):
        raise InfrastructureError(
            f"port {port} of {host} is taken", todo="choose another with --port"
        )
    state = home / "flower"
    for old in state.glob("state.db*"):
        old.unlink()
    write_private(_secret(home), secrets.token_bytes(32))
    # fmt: off
    options = [
        "--host", host, "--port", str(port),
        "--ssl-certfile", str(home / "server.crt"), "--ssl-keyfile", str(home / "server.key"),
        "--ssl-ca-certfile", str(home / "ca.crt"),
        "--enable-supernode-auth",
        "--isolation", "process", "--superexec-auth-secret-file", str(_secret(home)),
        "--database", str(state / "state.db"),
        "--disable-runtime-dependency-installation",
    ]
    # fmt: on
    with Child("superlink", options, home=state, log=state / "superlink.log") as child:
        child.wait_for_port(_own_name(host), port)
        yield child


@contextmanager
def study_grid(
    link: Child, address: str, ca: bytes, keys: dict[str, bytes], secret: bytes
) -> Iterator[Grid]:
    """Register the sites, start a run, claim its ServerApp task: the Grid to run the rounds on."""
    content = bundle()
    api.start_run(address, ca, keys, content, hashlib.sha256(content).hexdigest())
    runtime = api.Runtime(address, secret, ca)
    try:
        deadline = time.monotonic() + CLAIM_SECONDS
        while (claim := runtime.acquire([api.SERVER_APP])) is None:
            if time.monotonic() > deadline:
                raise InfrastructureError("the SuperLink gives out no task for its run")
            time.sleep(0.1)
    finally:
        runtime.close()
    with api.server_grid(address, ca, claim, give_up=lambda: not link.alive) as grid:
        yield grid


def bundle() -> bytes:
    """The app bundle of every run: names and no code, because every machine has its own."""
    project = (
        '[project]\nname = "fedtune"\nversion = "1.0.0"\n'
        '[tool.flwr.app]\npublisher = "fedtune"\n'
        '[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'
        "[tool.flwr.app.config]\n"
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", project)
    return buffer.getvalue()


def _secret(home: Path) -> Path:
    return home / "flower" / "executor.secret"


def _own_name(host: str) -> str:
    """The name that this machine calls its own SuperLink by: loopback where it listens there."""
    return "127.0.0.1" if host in {"0.0.0.0", "::", "localhost"} else host


def _blame(link: Child, error: httpx.HTTPError | InfrastructureError) -> InfrastructureError:
    if not link.alive:
        return link.ended()
    if isinstance(error, InfrastructureError):
        return error
    if "certificate" in str(error).lower():
        return InfrastructureError(
            "the SuperLink's certificate does not verify",
            "one that ca.crt signed for this host",
            "make_server_certificate with the host's name",
        )
    return InfrastructureError(
        f"the SuperLink refused a request ({type(error).__name__})", todo=f"read {link.log}"
    )


def _installed_rounds(home: Path) -> Run:
    from server import rounds
    from server.parts import Parts

    return functools.partial(rounds.run, parts=Parts(key=SigningKey.at(home / "signing.key")))
