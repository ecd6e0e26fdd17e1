"""A small consortium on which the tables of docs/incidents.md are played, row by row.

Every command runs as the page has it, in one folder that stands for everybody's machines. What
differs from a reader's: a fingerprint on the page is replaced by the one that was "read out"."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.cli import network
from fedtune.core.config import load_site, load_study
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from fedtune.evidence import sign
from fedtune.flower import certs
from fedtune.launch.simulate import simulate
from tests.cli_kit import run as command
from tests.cli_kit import write_study

PLACEHOLDER = "0123 4567 89ab cdef 0123"
FINGERPRINT = re.compile(r"fingerprint\s+((?:[0-9a-f]{4} ){4}[0-9a-f]{4})")
CONSORTIUM = re.compile(r"consortium\s+((?:[0-9a-f]{4} ){4}[0-9a-f]{4})")
HEAD = "| within | who | command | what is kept | who is told |"


@dataclass(frozen=True)
class Row:
    """A step: within which time, who, and its commands in words."""

    within: str
    who: str
    commands: tuple[tuple[str, ...], ...]


def tables(page: str) -> dict[str, list[list[Row]]]:
    """The tables of steps below each heading, in order."""
    found: dict[str, list[list[Row]]] = {}
    heading, inside = "", False
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        inside = line.startswith("|") and (inside or line == HEAD)
        if line == HEAD:
            found.setdefault(heading, []).append([])
        elif inside and not line.startswith("|---"):
            within, who, what, kept, told = (c.strip() for c in line.strip("|").split(" | "))
            assert within and who and what and kept and told, f"an empty cell: {line}"
            typed = re.findall(r"`((?:fedtune|sha256sum) [^`]+)`", what)
            found[heading][-1].append(Row(within, who, tuple(map(_words, typed))))
    return found


def _words(typed: str) -> tuple[str, ...]:
    return tuple(shlex.split(typed))


@dataclass
class Done:
    words: tuple[str, ...]
    code: int
    said: str
    seconds: float


@dataclass
class World:
    """root: the folder of everybody; heard: what was read out by phone, "" for the consortium's."""

    root: Path
    heard: dict[str, str] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)

    def play(self, rows: list[Row], expected: dict[str, int]) -> None:
        """Play a table. expected: the exit code of commands that do not end with 0, by a part of
        the command."""
        for words in (words for row in rows for words in row.commands):
            typed = shlex.join(words)
            code = next((c for part, c in expected.items() if part in typed), 0)
            done = self.type(*words)
            assert done.code == code, f"$ {typed}\n{done.code}, not {code}:\n{done.said}"

    def type(self, *words: str) -> Done:
        heard = self.heard.get("request" if "admit" in words else "consortium", "")
        typed = tuple(heard if word == PLACEHOLDER else word for word in words)
        began = time.monotonic()
        with chdir(self.root):
            if typed[0] == "fedtune":
                result = command(*typed[1:])
                code, said = result.exit_code, result.output
            else:
                ran = subprocess.run(typed, capture_output=True, text=True)
                code, said = ran.returncode, ran.stdout + ran.stderr
        self.done.append(Done(typed, code, said, time.monotonic() - began))
        if found := FINGERPRINT.search(said):
            self.heard["request"] = found[1]
        return self.done[-1]

    def ok(self, *words: str) -> str:
        done = self.type("fedtune", *words)
        assert done.code == 0, done.said
        return done.said

    def said(self, *parts: str) -> str:
        """What the commands with these parts printed."""
        every = [d.said for d in self.done if all(p in shlex.join(d.words) for p in parts)]
        assert every, f"nobody ran {parts}"
        return "\n".join(every)

    def events(self, folder: str) -> list[tuple[str, str]]:
        """(event, rule) of an audit log, oldest first."""
        lines = (self.root / folder / "audit.jsonl").read_text().splitlines()
        return [(entry["event"], entry["rule"]) for entry in map(json.loads, lines)]

    def site(self, name: str = "north") -> Path:
        return self.root / name / "site.toml"

    def ledger(self) -> Ledger:
        return Ledger(load_site(self.site()).home)

    def copied(self, to: Path) -> World:
        """The same world somewhere else, to be played on."""
        shutil.copytree(self.root, to)
        for file in (to / "st-mary" / "hospital.toml", to / "cardio" / "site.toml"):
            file.write_text(file.read_text().replace(str(self.root), str(to)))
        return World(to, dict(self.heard))


def make_world(root: Path, base: Path) -> World:
    """north and south in one consortium with a finished run that the coordinator signed, and a
    membership of a hospital's home, cardio, that is admitted too."""
    root.mkdir()
    write_study(root, base)
    hub = root / "hub"
    hub.mkdir()
    for name in ("study.toml", "evaluation.jsonl"):
        (root / name).rename(hub / name)
    world = World(root)
    made = ("memberships", "st-mary", "--add", "cardio", "--site", "cardio")
    shutil.copy(root / "north" / "data.jsonl", root / "cardio.jsonl")
    world.ok(*made, "--data", "cardio.jsonl", "--declared-size", "40")
    file = root / "cardio" / "site.toml"
    named = re.sub(
        r'^name = "[^"]+"', 'name = "cardio-north"', file.read_text(), count=1, flags=re.M
    )
    file.write_text(named)
    for folder, name in (("north", "north"), ("south", "south"), ("cardio", "cardio-north")):
        request = f"{name}.request"
        world.ok("enroll", f"{folder}/site.toml", "--out", request)
        admitted = world.ok("admit", request, "--home", "hub/coordinator", "--address", "hub:8443",
                            "--fingerprint", world.heard["request"])  # fmt: skip
        (world.heard["consortium"],) = CONSORTIUM.findall(admitted)
        with chdir(root):
            answer = Path(f"{name}.answer")
            network.join(load_site(world.site(folder)), answer, world.heard["consortium"])
    (hub / "coordinator" / "address").write_text("hub:8443\n")
    key = SigningKey.at(hub / "coordinator" / "signing.key")
    sites, run = [load_site(world.site(name)) for name in ("north", "south")], hub / "runs" / "hub"
    simulate(load_study(hub / "study.toml"), sites, run, key=key)
    sign.sign_files(run, key, certs.ca(hub / "coordinator")[1].public_bytes(certs.PEM).decode())
    world.done.clear()
    return world


def without(rows: list[Row], part: str) -> list[Row]:
    """The rows without the one whose command has this part: somebody skipped a step."""
    left = [row for row in rows if not any(part in shlex.join(words) for words in row.commands)]
    assert len(left) < len(rows), f"no step has {part}"
    return left


def commands(page: str) -> Iterator[tuple[str, ...]]:
    for found in tables(page).values():
        yield from (words for rows in found for row in rows for words in row.commands)
