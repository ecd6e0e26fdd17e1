"""Run pytest in forks of one process that has imported the libraries, and nothing of this project.

    python tests/mutants/forked.py

Reads requests, a line each, {"folder", "arguments", "variables"}, and answers each with a line,
{"code", "output"}. Importing torch and transformers takes longer than most tests that a seeded bug
names; fedtune and the tests are imported anew in each child, from the folder, whatever bug is in
them. A child leads a session of its own, and what it started ends with it.
| an endless loop | is ended after CPU seconds of its own, however busy the machine is |
| a deadlock | after WALL seconds |"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import IO, Any, NoReturn

CPU, WALL = 600, 3600.0
LIBRARIES = (
    *("torch", "torch.nn.functional", "transformers", "peft", "opacus", "opacus.grad_sample"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"),
    *("transformers.models.auto.modeling_auto", "tokenizers", "safetensors.torch"),
    *("scipy.stats", "scipy.special", "scipy.optimize", "dp_accounting.pld", "dp_accounting.rdp"),
    *("numpy", "pandas", "pyarrow.parquet", "matplotlib.figure", "pydantic", "jinja2", "yaml"),
    *("typer", "typer.testing", "rich.console", "rich.table", "h11"),
    *("flwr.app", "flwr.clientapp", "flwr.serverapp", "cryptography.x509", "hypothesis", "pytest"),
)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run pytest in a child; code: None where it was ended."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            run(request, output)
        deadline, code = time.monotonic() + WALL, None
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if code is None:
            os.waitpid(child, 0)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    ended = code is None or code < 0
    return {"code": None if ended else code, "output": text[-6000:]}


def run(request: dict[str, Any], output: IO[bytes]) -> NoReturn:
    """In the child: become a process as `python -m pytest` is one."""
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU, CPU + 5))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request["folder"])
        sys.path.insert(0, request["folder"])
        os.environ.update(request["variables"])
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        import pytest

        code = int(pytest.main(request["arguments"]))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        code = 99
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main() -> None:
    del sys.path[0]  # this folder: its modules are imported as tests.mutants alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner says when to end
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
