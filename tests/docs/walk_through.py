"""A consortium by the lines of two doors, the coordinator's and the hospital's.

Every line runs as it is written: the coordinator's in a folder for its machine; a hospital's in
three, by each site under its own name. What differs from a reader's machines:

| the coordinator's name and address | loopback, and a free port                               |
| the base                           | a tiny random encoder, by --base                        |
| mail                               | the file is copied                                      |
| the telephone                      | what one terminal showed is typed at the other          |
"""

from __future__ import annotations

import csv
import os
import pty
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.docs.pages import Block, read
from tests.network.kit import FEDTUNE, environment

SITES = ("north", "south", "west")
LABELS = ("allergy", "exam", "plan")
ROUNDS = 1
FINGERPRINT = re.compile(r"fingerprint   ((?:[0-9a-f]{4} ){4}[0-9a-f]{4})")
CONSORTIUM = re.compile(r"consortium   ((?:[0-9a-f]{4} ){4}[0-9a-f]{4})")


class Terminal:
    """A command on a terminal of its own: what it shows, and what is typed."""

    def __init__(self, cwd: Path, words: list[str]) -> None:
        self.words, self.shown = words, ""
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*FEDTUNE, *words[1:]],
            cwd=cwd,
            env=environment() | {"TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other end has gone
            while chunk := os.read(self._ours, 65_536):
                self.shown += chunk.decode(errors="replace")

    def type(self, line: str) -> None:
        os.write(self._ours, f"{line}\n".encode())

    def until(self, words: str, seconds: float = 60.0, times: int = 1) -> None:
        """Wait until the words were shown so often."""
        deadline = time.monotonic() + seconds
        while self.shown.count(words) < times:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            assert not ended and time.monotonic() < deadline, f"no {words!r}:\n{self}"
            time.sleep(0.05)

    def done(self, seconds: float = 60.0) -> str:
        """What it showed, when it has ended well."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        assert code == 0, f"{code}:\n{self}"
        return self.shown

    def __str__(self) -> str:
        return f"$ {shlex.join(self.words)}\n{self.shown[-3000:]}"


def steps(block: Block) -> list[tuple[str, list[list[str]]]]:
    """(whose machine, the words of each of its commands), in order."""
    found: list[tuple[str, list[list[str]]]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            found.append((line.removeprefix("# ").partition(":")[0], []))
        elif line:
            found[-1][1].append(shlex.split(line))
    return found


def table(path: Path, rows: int, first: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dialogue", "section"])
        for n in range(first, first + rows):
            # A third speak of another section: public records alone do not know all there is.
            said = LABELS[(n + (n % 7 in (2, 5))) % 3]
            writer.writerow([f"note {n} says {said}", LABELS[n % 3]])


class WalkThrough:
    """The machines (root/coordinator and a folder per site), and what runs on them."""

    def __init__(self, root: Path, base: Path, port: int) -> None:
        self.root, self.base, self.port = root, base, port
        self.running: dict[str, Terminal] = {}
        self.heard: dict[str, str] = {}  # by telephone: a site's fingerprint; the consortium's
        self.commands: list[tuple[str, str]] = []
        for n, name in enumerate(("coordinator", *SITES)):
            (root / name).mkdir()
            file = "public.csv" if name == "coordinator" else f"{name}.csv"
            table(root / name / file, 60, 1000 * n)

    def run(self, block: Block) -> None:
        here = {"coordinator.example.org": f"127.0.0.1:{self.port}"}
        for whose, commands in steps(block):
            for words in commands:
                for machine in SITES if whose == "each site" else (whose,):
                    own = [word.replace("north", machine) for word in words]
                    getattr(self, f"_{words[1]}")(machine, [here.get(w, w) for w in own])

    def _terminal(self, machine: str, words: list[str]) -> Terminal:
        folder = self.root / machine
        self.commands.append((machine, words[1]))
        return Terminal(folder, list(_expanded(folder, words)))

    def _init(self, machine: str, words: list[str]) -> None:
        if machine == "coordinator":
            server = self._terminal(machine, [*words, "--base", str(self.base)])
            self.running[machine] = server
            return server.until("waiting      for sites", 300)
        shown = self._terminal(machine, words).done()
        folder = self.root / machine / words[2]
        self.heard[machine] = FINGERPRINT.findall(shown)[0]
        shutil.copy(folder / f"{machine}.request", self.root / "coordinator")
        text, own = (folder / "site.toml").read_text(), "[policy]\n"
        assert text.count(own) == 1
        (folder / "site.toml").write_text(text.replace(own, f'{own}bases = "any"\n'))

    def _admit(self, machine: str, words: list[str]) -> None:
        admit = self._terminal(machine, words)
        for number in range(1, len(SITES) + 1):
            admit.until("is it the same, all of it?", times=number)
            name = re.findall(r"the site (\S+) asks", admit.shown)[-1]
            same = FINGERPRINT.findall(admit.shown)[-1] == self.heard[name]
            admit.type("y" if same else "n")
        self.heard["consortium"] = CONSORTIUM.findall(admit.done())[0]
        for name in SITES:
            shutil.copy(self.root / machine / f"{name}.answer", self.root / name)

    def _client(self, machine: str, words: list[str]) -> None:
        client = self._terminal(machine, words)
        self.running[machine] = client
        client.until("fingerprint, as it was read out to you")
        client.type(self.heard["consortium"])
        client.until("joined the consortium")

    def end(self) -> None:
        for each in self.running.values():
            if each.process.poll() is None:
                each.process.terminate()
        for each in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                each.process.wait(20)
            if each.process.poll() is None:
                each.process.kill()
                each.process.wait()


def _expanded(folder: Path, words: list[str]) -> Iterator[str]:
    """As a shell does: *.request becomes the files' names."""
    for word in words:
        yield from sorted(p.name for p in folder.glob(word)) if "*" in word else [word]


def consortium_block(coordinator: str, hospital: str) -> Block:
    """Return the lines of both pages that make a consortium, in order, under whose they are.

    coordinator, hospital: the text of docs/coordinator.md and of docs/hospital.md."""
    parts = (
        ("# coordinator", coordinator, "fedtune init hub"),
        ("# each site", hospital, "fedtune init north"),
        ("# coordinator", coordinator, "fedtune admit"),
        ("# each site", hospital, "fedtune client north/site.toml --answer"),
    )
    lines = list[str]()
    for whose, page, beginning in parts:
        (block,) = (b for b in read(page).blocks if b.text.startswith(beginning))
        lines += [whose, block.text]
    return Block(0, "sh", "\n".join(lines), "")
