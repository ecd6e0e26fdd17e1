"""Every option and argument of every command, with values that it cannot have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from fedtune.cli.main import app
from tests.fuzz.case import ANY_CODE, PLAN, PROMPTS, RUN, SERVE, SITE, Case, nothing

WHO = ("--name", "A", "--role", "board", "--reason", "read", "--key", "new.key")
# One invocation of each command, to which an option is added: short, or refused before any work.
USUAL: dict[str, tuple[str, ...]] = {
    "init": ("new",),
    "plan": (PLAN, "--size", "20"),
    "simulate": (PLAN, "none.toml", "--out", "new"),
    "tune": (PLAN, "--sites", "none.toml", "--out", "new"),
    "server": ("none.toml", *SERVE[2:]),
    "client": ("none.toml", "--once"),
    "vault": ("none.toml", "--socket", "door"),
    "courier": ("none.toml", "--spool", "new"),
    "evaluate": (RUN, "--data", "none.jsonl"),
    "predict": (RUN, "--data", "none.jsonl"),
    "accept": (RUN, "--site", SITE),
    "personalise": ("none", "--site", SITE),
    "versions": ("versions",),
    "generate": (RUN, "--max-new-tokens", "1"),
    "answers": ("none",),
    "verify": (RUN,),
    "release": ("none", "--out", "new"),
    "approve": ("dossier", "--trust", "00", *WHO),
    "enroll": (SITE, "--out", "new"),
    "admit": ("north.request", "--fingerprint", "00"),
    "revoke": ("south",),
    "doctor": (PLAN,),
    "backup": (PLAN, "--to", "new"),
    "restore": ("none.backup", "--to", "new"),
    "review": (PLAN, "--site", SITE),
    "ledger": (SITE,),
    "memberships": ("home",),
    "withdraw": (SITE, "--file", "keys.txt"),
    "let-go": (SITE,),
    "purge": (SITE,),
    "audit": ("none.toml", "--out", "new"),
    "label": ("none.jsonl", "--generator", "./none", "--out", "new.jsonl"),
    "improve": ("none", "--reward", "none", *PROMPTS),
    "distill": ("none", *PROMPTS),
    "merge": ("none", "other", "--out", "new"),
    "export": ("none", "--out", "new"),
    "choose-base": ("none.toml", "--target", "1"),
    "check-plugin": ("fedavg", "--group", "strategies"),
    "status": (RUN, "--once"),
    "log": (SITE,),
    "attack": ("none", "--out", "new"),
    "models list": (),
    "models fetch": ("./none",),
    "models verify": ("./none",),
    "data report": (SITE,),
    "data describe": (SITE,),
    "data scan": ("none.toml",),
}
NUMBERS = ("", "x", "nan", "inf", "-1", "1e400", "9" * 40, "0x10", "1_0", "٣", "1,5", "\x1b[31m")
NAMES = ("", " ", "\x1b[31m[/x]", "a\nb", "\udc80", "n" * 300, "-", "[/bold]", "=",
         "a" * 90_000)  # fmt: skip
PLACES = (*NAMES, "keys.txt/a", "pipe", "loop", "empty", "/proc/self/mem", "~nobody/x")


def commands() -> dict[str, click.Command]:
    """Every command by its words."""

    def below(group: click.Group, words: str) -> Iterator[tuple[str, click.Command]]:
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                yield from below(command, f"{words}{name} ")
            else:
                yield f"{words}{name}", command

    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    return dict(below(root, ""))


def values(kind: click.ParamType) -> tuple[str, ...]:
    if kind.name in ("integer", "float", "integer range", "float range"):
        return NUMBERS
    return PLACES if kind.name in ("path", "file", "filename") else NAMES


def options() -> Iterator[Case]:
    """Each bad value for each option and argument; a flag is given a value, and twice."""
    for words, command in commands().items():
        if words not in USUAL:  # demo reads nothing of anybody's, and a page serves for ever
            continue
        usual = (*words.split(), *USUAL[words])
        yield Case(f"option: unknown: {words}", nothing, (*usual, "--no-such-option"), ANY_CODE)
        yield Case(f"option: one more: {words}", nothing, (*usual, "x" * 200), ANY_CODE)
        for param in command.params:
            if isinstance(param, click.Option) and param.is_flag:
                yield Case(
                    f"option {param.opts[0]}: a value: {words}",
                    nothing,
                    (*usual, f"{param.opts[0]}=x"),
                    ANY_CODE,
                )
                continue
            for number, value in enumerate(values(param.type)):
                if isinstance(param, click.Option):
                    called = (*usual, param.opts[0], value)
                else:
                    called = (*words.split(), value, *USUAL[words][1:])
                name = param.opts[0] if isinstance(param, click.Option) else f"<{param.name}>"
                yield Case(f"option {name}: value {number}: {words}", _odd, called, ANY_CODE)


def _odd(world: Path) -> None:
    """What PLACES names."""
    (world / "loop").symlink_to("loop")
    (world / "empty").touch()
    os.mkfifo(world / "pipe")
