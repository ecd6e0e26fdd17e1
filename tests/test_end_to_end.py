"""The whole of it: from files to a report, in one process, over TLS, and with a real model."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from safetensors.numpy import load_file

from fedtune.core.errors import InputError
from fedtune.demo.generate import NINE, write
from fedtune.officer.site_files import sites_in
from tests.depth import long_but
from tests.simulated import simulate
from tests.test_cli import run

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
rounds = 3
local_steps = 2
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
{unit}
[strategy]
min_sites = 2
round_timeout = 120
[evaluation]
path = "test.jsonl"
columns = {{ prompt = "q", completion = "a" }}
"""
SITE = """
[site]
name = "{name}"
declared_size = 20
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", completion = "a", patient = "who" }}
[policy]
bases = "any"
allow_privacy_off = true
[coordinator]
address = "127.0.0.1:{port}"
answer = "{keys}.answer"
"""
NAMES = ("north", "south")


def lay_out(folder: Path, base: Path, privacy: str, port: int = 1, keys: str = "none") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for name in (*NAMES, "test"):
        rows = [
            {"who": str(i // 2), "q": f"fever day {draw.randint(1, 99)}", "a": draw.choice("yn")}
            for i in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in NAMES:
        text = SITE.format(name=name, port=port, keys=f"{keys}/{name}")
        text = text.replace("[data]", f'state = "state-{name}"\n[data]')
        (folder / f"site-{name}.toml").write_text(text)
    unit = 'unit = "patient"' if privacy == '"off"' else ""
    (folder / "study.toml").write_text(STUDY.format(privacy=privacy, base=base, unit=unit))
    return folder / "study.toml"


def from_the_log(path: Path, delta: float) -> float:
    """ε of a step log, by dp-accounting alone: none of fedtune's code."""
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    keys = ("noise_multiplier", "sampling_rate", "records")
    counts = Counter[tuple[float, float, int]]()
    for line in steps:  # all steps of a round are one
        counts[line[keys[0]], line[keys[1]], line[keys[2]]] += line.get("steps", 1)
    return by_the_library(tuple(counts.items()), delta)


@cache
def by_the_library(events: tuple[tuple[tuple[float, float, int], int], ...], delta: float) -> float:
    mixed = any(most > 1 for (_, _, most), _ in events)
    accountant = PLDAccountant(value_discretization_interval=1e-3 if mixed else 1e-4)
    for (sigma, rate, most), count in events:
        event: Any = dp_accounting.GaussianDpEvent(sigma)
        if most > 1:
            times = range(most + 1)
            odds = [math.comb(most, n) * rate**n * (1 - rate) ** (most - n) for n in times]
            event = dp_accounting.dp_event.MixtureOfGaussiansDpEvent(
                sigma, [float(n) for n in times], odds
            )
        elif rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, count))
    return float(accountant.get_epsilon(delta))


PRIVATE = '{ epsilon = 5.0, delta = 1e-3, unit = "patient" }'


# σ and not ε: the noise for several rows of a unit takes ten seconds to find (test_accountant.py).
RECORDS = PRIVATE.replace("epsilon = 5.0", "noise_multiplier = 1.37")
RECORDS = RECORDS.replace(" }", ', sampling = "record", max_records_per_unit = 2 }')


@pytest.mark.parametrize(
    ("rate", "privacy"),
    long_but([("0.3", RECORDS)], [("1.0", PRIVATE), ("0.3", PRIVATE), ("0.3", RECORDS)]),
)
def test_epsilon_in_the_report_is_that_of_the_step_log(
    tmp_path: Path, tiny_base: Path, rate: str, privacy: str
) -> None:
    study = lay_out(tmp_path, tiny_base, privacy)
    study.write_text(study.read_text().replace("sampling_rate = 1.0", f"sampling_rate = {rate}"))
    simulate(study, sites_in(tmp_path), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for name in NAMES:
        alone = from_the_log(tmp_path / f"state-{name}" / "steps.jsonl", 1e-3)
        ours = report["privacy"]["sites"][name]["epsilon"]
        # Another grid of the mixture's PLD may be at most so much coarser, never below.
        assert ours == pytest.approx(alone, rel=2e-3 if privacy == RECORDS else 1e-6)
    assert report["privacy"]["epsilon"] <= 5.0
    assert report["privacy"]["steps"] == 6
    assert report["privacy"]["unit"] == "patient"
    assert (tmp_path / "run" / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_without_privacy_is_marked_everywhere(tmp_path: Path, tiny_base: Path) -> None:
    study = lay_out(tmp_path, tiny_base, '"off"')
    body = simulate(study, sites_in(tmp_path), tmp_path / "run")
    assert body["private"] is False
    assert "epsilon" not in body["privacy"]
    assert "NOT PRIVATE" in (tmp_path / "run" / "report.md").read_text()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["private"] is False for line in metrics)


# ---------------------------------------------------------------------- simulation == network


@contextmanager
def command(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A fedtune process of its own; stopped by its handle if it has not ended."""
    words = [
        sys.executable,
        "-c",
        "from fedtune.cli.main import main; main()",
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent, env=environment
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@pytest.mark.long  # test_from_nothing.py has such processes in every run
def test_tls_processes_give_the_same_adapter_as_simulation(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """σ = 0 and every unit in every step: the same numbers to 1e-6, from `fedtune simulate` and
    from `fedtune server` with two `fedtune client`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    keys, home = str(tmp_path), tmp_path / "home"
    here = lay_out(tmp_path / "here", tiny_base, '"off"', port, keys)
    there = lay_out(tmp_path / "there", tiny_base, '"off"', port, keys)
    simulate(here, sites_in(here.parent), here.parent / "run")
    out = there.parent / "run"
    logs = tmp_path / "logs"
    logs.mkdir()
    with ExitStack() as running:
        at = ("--home", home, "--port", port)
        server = running.enter_context(command(logs / "server", "server", there, "--out", out, *at))
        for name in NAMES:
            site = there.parent / f"site-{name}.toml"
            request, answer = tmp_path / f"{name}.request", tmp_path / f"{name}.answer"
            said = run("enroll", site, "--out", request).output
            heard = ("--fingerprint", said.partition("fingerprint   ")[2].splitlines()[0])
            place = ("--address", f"127.0.0.1:{port}")
            done = run("admit", request, "--home", home, *heard, *place, "--out", answer)
            assert done.exit_code == 0, done.output
            running.enter_context(command(logs / name, "client", site, "--once"))
        code = server.wait(150)
        assert code == 0, (logs / "server").read_text()[-2000:]
    for file in ("adapter/adapter_model.safetensors",):
        one, two = load_file(here.parent / "run" / file), load_file(out / file)
        assert set(one) == set(two)
        assert max(float(np.abs(one[n] - two[n]).max()) for n in one) <= 1e-6
        assert max(float(np.abs(one[n]).max()) for n in one if "lora_B" in n) > 1e-4


# ------------------------------------------------------------------------------ the real model


@pytest.mark.long
@pytest.mark.real
def test_three_hospitals_teach_a_real_model(tmp_path: Path) -> None:
    """The demo's study on a third of its patients and three rounds: far above the base at ε ≤ 8,
    and plain PEFT gives the saved adapter's logits."""
    study = write(tmp_path, 3, NINE)
    for notes in (tmp_path / "sites").glob("*/notes.jsonl"):
        notes.write_text("".join(notes.read_text().splitlines(keepends=True)[:160]))
    test = tmp_path / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:135]))
    study.write_text(study.read_text().replace("rounds = 8", "rounds = 3"))
    body = simulate(study, sites_in(tmp_path / "sites"), tmp_path / "run")
    before, after = (body["quality"][when]["accuracy"] for when in ("before", "after"))
    assert body["privacy"]["epsilon"] <= 8.0
    assert before < 0.3
    assert after > before + 0.15
    same_logits_by_plain_peft(tmp_path / "run")


PLAIN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(100, 140)[None]).logits.float(), out)
"""


def same_logits_by_plain_peft(run: Path) -> None:
    import torch

    from fedtune.core.config import study_from_json
    from fedtune.core.models.adapter_files import load_adapter
    from fedtune.core.models.build import build

    network = build(study_from_json((run / "plan.json").read_text()))
    saved = load_adapter(run / "adapter")
    network.load_frozen({n: v for n, v in saved.items() if "lora_A" in n})
    network.load_trainable({n: saved[n] for n in network.parameters()})
    dtype = str(network.dtype).removeprefix("torch.")  # as it measures faster at this moment
    arguments = [str(network.base.path), str(run / "adapter"), str(run / "logits"), dtype]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, capture_output=True)
    theirs = torch.load(run / "logits", weights_only=True)
    ids = torch.arange(100, 140)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        ours = network.logits(network.hidden(network.prefix(ids, mask), mask)[0])
    scale = float(theirs.abs().max())
    assert math.isfinite(scale)
    # bf16 carries 8 bits: the same sums in another order differ in the last of them.
    assert float((ours - theirs[0]).abs().max()) <= scale * 2**-6


# --------------------------------------------------------------------------------- bad input


def spoil(folder: Path, how: str) -> None:
    north, study = folder / "north.jsonl", folder / "study.toml"
    good = north.read_text().splitlines()
    row = {"who": "p", "q": "SECRET-WORD", "a": "y"}
    if how == "digest":
        text = study.read_text()
        study.write_text(text.replace("[base]", f'[base]\ndigest = "sha256:{"0" * 64}"'))
        return
    lines = {
        "empty": [],
        "column": ['{"other": "SECRET-WORD"}'] * 3,
        "one": good[:1],
        "long": [json.dumps(row | {"q": "SECRET-WORD " * 10_000})] * 3,
        "nul": [json.dumps(row | {"q": "SECRET-WORD\0"})] * 3,
    }[how]
    north.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "no records"),
        ("column", r"data\.columns"),
        ("one", "belong to one patient"),
        ("long", "too long"),
        ("nul", "NUL"),
        ("digest", "digest"),
    ],
)
def test_bad_input_is_a_named_error_and_leaves_nothing(
    tmp_path: Path, tiny_base: Path, how: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    study = lay_out(tmp_path, tiny_base, PRIVATE)
    spoil(tmp_path, how)
    with pytest.raises(InputError, match=says) as caught:
        simulate(study, sites_in(tmp_path), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()
    assert not any(tmp_path.glob("state-*"))
    shown = "".join(capfd.readouterr()) + str(caught.value)
    assert "SECRET-WORD" not in shown


def test_a_label_that_the_plan_does_not_know_is_a_named_error_and_leaves_nothing(
    tmp_path: Path, tiny_encoder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = lay_out(tmp_path, tiny_encoder, PRIVATE)
    text = study.read_text().replace('name = "causal_lm"', 'name = "classify"\nlabels = ["a", "b"]')
    head, _, rest = text.partition("[lora]")
    text = head + rest[rest.index("[objective]") :]
    study.write_text(text[: text.index("[evaluation]")])
    for name in NAMES:
        path = tmp_path / f"site-{name}.toml"
        path.write_text(path.read_text().replace('prompt = "q", completion', 'text = "q", label'))
    rows = [{"who": f"p{n}", "q": "fever", "a": "SECRET-WORD"} for n in range(4)]
    (tmp_path / "north.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"objective\.labels") as caught:
        simulate(study, sites_in(tmp_path), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists() and not any(tmp_path.glob("state-*"))
    assert "SECRET-WORD" not in "".join(capfd.readouterr()) + str(caught.value)
