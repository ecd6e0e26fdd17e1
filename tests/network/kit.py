"""A consortium as its people would set it up: folders, and `fedtune` commands as processes.

A process is ended by its handle alone, or as the child of a handle.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedtune.core.dp.steplog import StepLog
from fedtune.core.ledger.files import KEY
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from tests.test_cli import run as in_process

MAIN = "from fedtune.cli.main import main; main()"
FEDTUNE = [sys.executable, "-c", MAIN]
SITES = ("east", "north", "south")
OFF = '"off"'
PRIVATE = '{ noise_multiplier = 4.0, delta = 1e-3, unit = "record" }'
STUDY = """
privacy = {privacy}
[study]
name = "small"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 4
alpha = 8
modules = ["q_proj", "down_proj"]
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = {rounds}
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[strategy]
min_sites = {min_sites}
round_timeout = {round_timeout}
"""
SITE = """
[site]
name = "{name}"
declared_size = 40
[data]
path = "data.jsonl"
columns = {{ prompt = "prompt", completion = "completion" }}
[policy]
bases = "any"
allow_privacy_off = true
max_epsilon = 50.0
max_epsilon_per_study = 50.0
max_fallback_epsilon = 100.0
"""
SECURE = "[secure_aggregation]\ncolluding = 1\n"


def until(true: Callable[[], Any], seconds: float, tell: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not happen in {seconds:.0f} s\n{tell()}"
        time.sleep(0.05)


def environment(packages: Path | None = None) -> dict[str, str]:
    """This process's, without the proxies of the machine that the tests run on. packages: where
    another release of fedtune lies."""
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    other = {"PYTHONPATH": str(packages)} if packages else {}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **other}


def done(cwd: Path, *words: object, packages: Path | None = None) -> str:
    """What a command prints that ends well: in this process, since one of its own takes seconds to
    start; another release's `packages` in one of their own."""
    if packages is None:
        with chdir(cwd):
            here = in_process(*words)
        assert here.exit_code == 0, here.output
        return here.stdout
    run, its = [*FEDTUNE, *map(str, words)], environment(packages)
    found = subprocess.run(run, cwd=cwd, env=its, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def said(text: str, what: str) -> str:
    """The rest of the line that begins with `what`."""
    return next(line for line in text.splitlines() if line.startswith(what)).removeprefix(what)


def start(
    cwd: Path,
    log: Path,
    *words: object,
    prefix: Sequence[str] = (),
    broken: str = "",
    packages: Path | None = None,
) -> subprocess.Popen[bytes]:
    """broken: statements that run before the command, in its process: for a twin."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [*prefix, sys.executable, "-c", f"{broken}\n{MAIN}", *map(str, words)],
            cwd=cwd,
            env=environment(packages),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )


def without_network() -> list[str]:
    """What comes before a command to run it in a network of its own, with nothing in it."""
    found = subprocess.run(["unshare", "-rn", "true"], capture_output=True)
    return [] if found.returncode else ["unshare", "-rn"]


def end(process: subprocess.Popen[bytes], seconds: float = 20.0) -> int:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        process.kill()
    return process.wait()


# Statements that run before a client, so that its vault runs others once it is confined.
IN_ITS_VAULT = """
import sys
from fedtune.core import boot
plain = boot.command
def command(module, *options):
    if "vault" not in options:
        return plain(module, *options)
    code = {code!r} + f"import runpy, sys\\nsys.argv = {{[module, *options]!r}}\\n"
    code += f"runpy.run_module({{module!r}}, run_name='__main__', alter_sys=True)"
    return [sys.executable, "-P", "-c", code]
boot.command = command
"""


def in_its_vault(statements: str) -> str:
    """Return statements to run before a client, after which its vault runs these."""
    code = f"""
import fedtune.core.vault.process as vault
serve = vault.serve
def broken(*given):
    exec({statements!r}, {{}})
    return serve(*given)
vault.serve = broken
"""
    return IN_ITS_VAULT.format(code=code)


def children(parent: int) -> dict[str, int]:
    """The programs that a process of ours started, and those that these started in turn, as
    "superlink", "gateway", "vault", "courier" or "supernode" -> pid."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                if "fedtune.core.processes" in words:
                    program = words[words.index("fedtune.core.processes") + 1]
                    found[program] = int(folder.name)
                    found |= children(int(folder.name))
    return found


def records(path: Path, seed: int, count: int = 40) -> None:
    draw = random.Random(seed)
    rows = [
        {"prompt": f"fever day {draw.randint(1, 99)}", "completion": draw.choice("yn")}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Consortium:
    """root/hub is the coordinator's folder, root/NAME a site's; nothing is shared but what is sent.

    By "hub" or a site's name: where: what comes before a command to run it on that machine;
    packages: the release of fedtune there; broken: see `start`."""

    def __init__(self, root: Path, host: str, port: int) -> None:
        self.root, self.host, self.port = root, host, port
        self.hub, self.where = root / "hub", dict[str, list[str]]()
        self.packages, self.broken = dict[str, Path](), dict[str, str]()
        self.hub.mkdir(parents=True, exist_ok=True)
        self.running: list[subprocess.Popen[bytes]] = []
        self.is_secure = False  # whether the sums of all sites alone are opened
        self.fingerprint = ""  # the consortium's, once a site has joined
        for name in SITES:
            (root / name).mkdir()

    def lay_out(
        self, base: Path | str, privacy: str, rounds: int, *, tables: str = "", **strategy: float
    ) -> None:
        """The files of a small study on generated records. tables: more of study.toml."""
        asks = {"min_sites": len(SITES), "round_timeout": 60} | strategy
        text = STUDY.format(privacy=privacy, base=base, rounds=rounds, **asks)
        (self.hub / "study.toml").write_text(text + tables)
        self.is_secure = tables == SECURE
        for seed, name in enumerate(SITES):
            (self.root / name / "site.toml").write_text(SITE.format(name=name))
            records(self.root / name / "data.jsonl", seed)

    @property
    def run(self) -> Path:
        return self.hub / "run"

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def told(self) -> str:
        """The end of every log, for a test that fails."""
        logs = sorted(self.root.glob("*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in logs)

    def server(self, *more: str) -> subprocess.Popen[bytes]:
        words = ("server", "study.toml", "--host", self.host, "--port", self.port, "--out", "run")
        return self._started("hub", self.hub, *words, *more)

    def join(self, name: str) -> None:
        """enroll, admit with the fingerprint that the site read out, and both files sent."""
        folder = self.root / name
        heard = said(done(folder, "enroll", "site.toml"), "fingerprint   ")
        shutil.copy(folder / f"{name}.request", self.hub)
        text = done(self.hub, "admit", f"{name}.request", "--fingerprint", heard)
        shutil.copy(self.hub / f"{name}.answer", folder)
        self.fingerprint = said(text, "consortium   ")
        with (folder / "site.toml").open("a") as file:
            file.write(f'\n[coordinator]\nanswer = "{name}.answer"\n')
            file.write(f'fingerprint = "{self.fingerprint}"\n')

    def pin_peers(self) -> None:
        """Write each site's key, once they are made, into policy.peers of the others."""
        keys = {name: SigningKey.at(self.root / name / "state" / KEY).public for name in SITES}
        for name in SITES:
            path, peers = self.root / name / "site.toml", [k for n, k in keys.items() if n != name]
            text = path.read_text()
            path.write_text(text.replace("[policy]\n", f"[policy]\npeers = {json.dumps(peers)}\n"))

    def client(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        return self._started(name, self.root / name, "client", "site.toml", *more)

    def halves(self, name: str, *more: str) -> tuple[subprocess.Popen[bytes], ...]:
        """The vault and the courier of a site, each started by a command of its own."""
        return self.half(name, "vault", *more), self.half(name, "courier")

    def half(self, name: str, command: str, *more: str) -> subprocess.Popen[bytes]:
        return self._half(name, command, "--socket", "vault.socket", *more)

    def spooled(self, name: str, command: str, *more: str) -> subprocess.Popen[bytes]:
        """One half of a site whose halves share a folder."""
        return self._half(name, command, "--spool", "spool", *more)

    def _half(self, name: str, command: str, *more: str) -> subprocess.Popen[bytes]:
        return self._started(name, self.root / name, command, "site.toml", *more)

    def _started(self, name: str, folder: Path, *words: object) -> subprocess.Popen[bytes]:
        how: dict[str, Any] = {"prefix": self.where.get(name, ())}
        broken = self.broken.get(name, "")
        if broken and name in SITES:
            broken = in_its_vault(broken)
        how |= {"broken": broken, "packages": self.packages.get(name)}
        return self._kept(start(folder, self.log(name), *words, **how))

    def faults(self, name: str, port: int, mean_seconds: float, *silent: str) -> None:
        """Put a proxy between the site and the rest, on the site's own loopback: a delay on every
        chunk, and connections that break after `mean_seconds` on average; "silent": that pass
        nothing on from then on, and stay open at either end. Before client()."""
        with (self.root / name / "site.toml").open("a") as file:
            file.write(f'proxy = "http://127.0.0.1:{port}"\n')
        words = [*self.where.get(name, ()), sys.executable, "-c", FAULTS]
        with self.log(f"{name}-faults").open("wb") as sink:
            run = [*words, str(port), str(mean_seconds), *silent]
            self._kept(subprocess.Popen(run, stdout=sink, stderr=subprocess.STDOUT))

    def _kept(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self.running.append(process)
        return process

    def listens(self) -> bool:
        return (self.hub / "coordinator" / "address").exists()

    def rounds(self) -> int:
        """How many rounds are kept by now."""
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def report(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return body

    def spending(self, name: str) -> list[Any]:
        """What the site's ledger holds, as charged."""
        return Ledger(self.root / name / "state").spending("records")

    def noised(self, name: str) -> Counter[int]:
        """How many noised steps the site ran in each round, as the function that ran them noted."""
        log = StepLog(self.root / name / "state" / "steps.jsonl")
        return Counter(step.round for step in log.steps())


FAULTS = """
import asyncio, random, sys

held = []

async def pump(reader, writer):
    while chunk := await reader.read(65536):
        await asyncio.sleep(random.uniform(0.01, 0.06))
        writer.write(chunk)
        await writer.drain()

async def serve(reader, writer):
    far, silent = None, False
    try:
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        host, _, port = head.split()[1].decode().rpartition(":")
        near, far = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 OK\\r\\n\\r\\n")
        pumps = [asyncio.create_task(pump(reader, far)), asyncio.create_task(pump(near, writer))]
        left = random.expovariate(1 / float(sys.argv[2]))
        await asyncio.wait(pumps, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        cut = not any(each.done() for each in pumps)
        silent = cut and "silent" in sys.argv
        print("silent" if silent else "cut" if cut else "closed", flush=True)
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
    except (OSError, EOFError):
        pass
    finally:
        held.append((reader, writer, far) if silent else ())
        for each in filter(None, () if silent else (writer, far)):
            each.transport.abort()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""  # an HTTP CONNECT proxy that delays every chunk, and breaks connections or forgets them


@contextmanager
def consortium(root: Path, host: str, port: int) -> Iterator[Consortium]:
    made = Consortium(root, host, port)
    try:
        yield made
    finally:
        for process in made.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in made.running:
            end(process)
