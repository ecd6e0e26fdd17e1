"""What test_cli.py and test_cli_runs.py share."""

from __future__ import annotations

import functools

import click
import typer
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


def run(*arguments: object, on: typer.Typer = app) -> Result:
    """Run a command in this process, as it is typed."""
    return CliRunner().invoke(tree(on), [str(a) for a in arguments])


@functools.cache
def tree(of: typer.Typer) -> click.Command:
    """click's tree of the commands; it takes longer to make than most commands to run."""
    return typer.main.get_command(of)
