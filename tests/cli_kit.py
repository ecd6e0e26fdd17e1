"""What test_cli.py and test_cli_runs.py share."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import click
import pytest
import typer
from click import testing
from click.testing import CliRunner, Result

from fedtune.cli.main import app

STUDY = """
{privacy_off}
[study]
name = "tiny"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
{privacy}
[evaluation]
path = "evaluation.jsonl"
metric = "accuracy"
choices = [" yes", " no"]
[evaluation.columns]
prompt = "prompt"
completion = "completion"
"""


PRIVACY = "[privacy]\nepsilon = 8\ndelta = 1e-4\n"
SITE = """
[site]
name = "{name}"
declared_size = 12
[data]
path = "data.jsonl"
[data.columns]
prompt = "prompt"
completion = "completion"
[policy]
bases = "any"
max_epsilon = {most}
allow_privacy_off = {off}
"""


def write_study(folder: Path, base: Path) -> Path:
    """study.toml beside two sites' folders."""
    rows = [
        json.dumps({"prompt": f"Record {i}: is it so?", "completion": (" yes", " no")[i % 2]})
        for i in range(12)
    ]
    for name in ("north", "south"):
        (folder / name).mkdir()
        (folder / name / "data.jsonl").write_text("\n".join(rows))
        (folder / name / "site.toml").write_text(SITE.format(name=name, most=8, off="false"))
    (folder / "evaluation.jsonl").write_text("\n".join(rows))
    path = folder / "study.toml"
    path.write_text(STUDY.format(base=base, privacy=PRIVACY, privacy_off=""))
    return path


def run(*arguments: object, on: typer.Typer = app) -> Result:
    """Run a command in this process, as it is typed."""
    return CliRunner().invoke(tree(on), [str(a) for a in arguments])


@functools.cache
def tree(of: typer.Typer) -> click.Command:
    """click's tree of the commands; it takes longer to make than most commands to run."""
    return typer.main.get_command(of)


def at_a_terminal(*words: object, typed: str) -> Result:
    """Run a command whose input is a terminal, at which a person types."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
        return CliRunner().invoke(tree(app), [str(word) for word in words], input=typed)
