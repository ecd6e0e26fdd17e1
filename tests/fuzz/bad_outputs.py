"""Outputs that are there already, that are no files, or that nobody may write."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.case import ANY_CODE, PLAN, RUN, SERVE, SITE, Case, Damage

# Commands up to the name of what they write; each gets there at once, or is refused before.
WRITES: dict[str, tuple[str, ...]] = {
    "init": ("init",),
    "simulate": ("simulate", PLAN, "none.toml", "--out"),
    "enroll": ("enroll", SITE, "--out"),
    "admit": ("admit-rightly", "--address", "hub.example:8443", "--out"),
    "backup": ("backup", PLAN, "--out", RUN, "--to"),
    "restore": ("restore", "hub.backup", "--to"),
    "release": ("release", RUN, "--out"),
    "approve": ("approve", "dossier", "--trust", "00", "--name", "A", "--role", "b", "--reason",
                "c", "--key"),
    "export": ("export", RUN, "--out"),
    "merge": ("merge", RUN, "other", "--no-measure", "--out"),
    "predict": ("predict", RUN, "--data", "evaluation.jsonl", "--choice", "y", "--choice", "n",
                "--out"),
    "data report": ("data", "report", SITE, "--html"),
    "data describe": ("data", "describe", SITE, "--public"),
    "label": ("label", "north.jsonl", "--column", "prompt=q", "--generator", "./base", "--out"),
    "choose-base": ("choose-base", PLAN, "--target", "1", "--base", "./base", "--json"),
    "ledger": ("ledger", SITE, "--backup"),
    "attack": ("attack", "none", "--out"),
}  # fmt: skip


def _named(name: str) -> Damage:
    """Something else of that name, which must be as it was when the command has failed."""

    def damage(world: Path) -> None:
        path = world / name
        if name == "pipe":
            os.mkfifo(path)
        elif name == "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(name)
        elif name.startswith("link"):
            path.symlink_to({"link": PLAN, "link-nowhere": "none/at/all", "link-loop": name}[name])
        elif name == "full":
            path.mkdir()
            (path / "kept").touch()

    return damage


NAMES = ("pipe", "socket", "link", "link-nowhere", "link-loop", "full", PLAN, SITE, "north.jsonl",
         "state-north/site.key", "coordinator/ca.pem", "run", "run/plan.json", "keys.txt/below",
         "pipe/below", "a" * 300, "a\x1b[31mb", "a\nb", "\udc80")  # fmt: skip


def outputs() -> Iterator[Case]:
    """Each command that writes where a person says, onto each thing that is there."""
    for said, command in WRITES.items():
        for number, name in enumerate(NAMES):
            if said == "choose-base" and name.endswith(".json"):  # it replaces that
                continue
            made = "pipe" if name == "pipe/below" else name
            yield Case(f"output {number}: {said}", _named(made), (*command, name), ANY_CODE)
    for name in ("pipe", "link-loop", "keys.txt/below", "a" * 300):
        for option in ("--out", "--home"):
            called = (*SERVE, option, name)
            yield Case(f"output {name[:20]}: server {option}", _named(name), called, ANY_CODE)


SETTINGS = (
    "", "=", "a", "=1", "training.rounds", "training.rounds=", "training.rounds=x",
    "training.rounds=" + "9" * 5000, "training.rounds=" + "[" * 20_000, "training.rounds=1e400",
    "training.rounds=\x1b[31m", "training.rounds=1\nprivacy='off'", "training.rounds=[/bold]",
    "training.rounds={" + ".".join("a" * 3000) + "=1}", ".".join("a" * 3000) + "=1",
    "training=1", "training=[]", "study.name=../x", "study.name=" + "n" * 300, "base.model=\0",
    "base.model=", "no.such.key=1", "a" * 90_000 + "=1", "privacy.delta=nan", "lora.modules=[1]",
    "lora.modules=" + str(["m"] * 2000), "objective.labels=" + str([""] * 3),
    "training.rounds=0.1", "training.rounds=true", "training.rounds=2026-01-01", "\udc80=1",
    'study.name="\udc80"', "evaluation.path=pipe", "evaluation.path=/", "schedule.every=1h",
    "strategy.name=os", "objective.name=__main__", "secure_aggregation={}", "start.steps=99999999",
)  # fmt: skip
TAKES_SETTINGS: dict[str, tuple[str, ...]] = {
    "plan": ("plan", PLAN, "--size", "20"),
    "simulate": ("simulate", PLAN, "none.toml", "--out", "new"),
    "server": SERVE,
    "tune": ("tune", PLAN, "--sites", "none.toml", "--out", "new"),
    "doctor": ("doctor", PLAN),
    "review": ("review", PLAN, "--site", SITE),
    "audit": ("audit", PLAN, "--run", "none", "--out", "new"),
    "choose-base": ("choose-base", PLAN, "--target", "nan"),
    "data report": ("data", "report", SITE, "--study", PLAN),
}


def settings() -> Iterator[Case]:
    """Bad values beside a study.toml, for every command that takes them."""
    for said, command in TAKES_SETTINGS.items():
        for number, setting in enumerate(SETTINGS):
            if said in ("server", "doctor", "review", "data report") and number % 3:
                continue
            if said == "server" and setting.startswith("evaluation"):  # noticed by the process
                continue
            name = f"setting {number}: {said}"
            yield Case(name, lambda world: None, (*command, "--set", setting), ANY_CODE)
