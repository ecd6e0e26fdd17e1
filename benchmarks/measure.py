"""Measure time and memory, and write the rows of every benchmark here.

Times: all variants in one process with one thread count, in turns whose order rotates, so that what
slows the machine for a while slows all of them; medians, ranges, and the median of paired ratios.
Memory: each variant in a fresh process; the highest resident set since the base was loaded."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Protocol

import torch
from scipy.stats import t

RESULT = "result: "  # what a fresh process prefixes its one line of JSON with


class Step(Protocol):
    name: str

    def step(self) -> None: ...


# ------------------------------------------------------------------------------------------ time


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Time one call; on a GPU, by its own clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def interleaved(
    steps: Sequence[Step], rounds: int, device: str = "cpu", warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each round by name. Every round runs every variant once; its order is the last
    one's rotated by one, and reversed every other time, so that no variant always follows the same
    one."""
    times: dict[str, list[float]] = {step.name: [] for step in steps}
    for number in range(-warm, rounds):
        at = number % len(steps)
        order = [*steps[at:], *steps[:at]][:: -1 if number % 2 else 1]
        for step in order:
            gc.collect()  # one variant's garbage must not be swept on another's time
            took = seconds(step.step, device)
            if number >= 0:
                times[step.name].append(took)
    return times


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median of the paired ratios."""
    return median(a / b for a, b in zip(of, to, strict=True))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


# ---------------------------------------------------------------------------------------- memory


def reset_peak(device: str = "cpu") -> float:
    """Reset the peak of memory; returns the MiB in use now."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return in_use(device)


def in_use(device: str = "cpu") -> float:
    """MiB."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS") if sys.platform == "linux" else peak(device)


def peak(device: str = "cpu") -> float:
    """Peak MiB since `reset_peak`.

    Linux's VmHWM rather than ru_maxrss: the latter cannot be reset, so the transient of loading a
    model hides what a step needs, and across exec it keeps the parent's peak."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def fresh(module: str, *arguments: str, timeout: float | None = None) -> dict[str, Any]:
    """Run `python -m module arguments` in a process of its own with as many threads; returns what
    it passed to `answer`.

    Errors: RuntimeError with the last line of its output, where it fails; TimeoutError, where it
    takes longer than `timeout` seconds, after it was ended."""
    command = [sys.executable, "-m", module, *arguments]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | threads, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"not finished after {error.timeout:.0f} s") from None
    for line in process.stdout.splitlines():
        if line.startswith(RESULT):
            result: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return result
    last = (process.stderr.strip() or process.stdout.strip() or "no output").splitlines()[-1]
    raise RuntimeError(last)


def answer(result: Mapping[str, Any]) -> None:
    print(RESULT + json.dumps(result), flush=True)


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Bound:
    """A figure that must hold. limit: at most that much, or at least where `least`."""

    says: str
    value: float | None  # None: not measured in this run
    limit: float
    least: bool = False
    unit: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        good = self.value >= self.limit if self.least else self.value <= self.limit
        return "met" if good else "MISSED"


@dataclass
class Table:
    """Rows of one benchmark and the bounds that they are held to."""

    name: str
    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += [
            "| " + " | ".join(_shown(row.get(c)) for c in columns) + " |" for row in self.rows
        ]
        if self.bounds:
            lines += ["", "| must hold | measured | bound | |", "|---|---|---|---|"]
            lines += [shown_bound(bound) for bound in self.bounds]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def save(self, out: Path) -> None:
        """OUT/name.md and OUT/name.json."""
        out.mkdir(parents=True, exist_ok=True)
        bounds = [vars(b) | {"verdict": b.verdict} for b in self.bounds]
        content = {"title": self.title, "rows": self.rows, "bounds": bounds, "notes": self.notes}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (out / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")
        (out / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")


def shown_bound(bound: Bound) -> str:
    value = "–" if bound.value is None else f"{bound.value:.3g}{bound.unit}"
    sign = "≥" if bound.least else "≤"
    return f"| {bound.says} | {value} | {sign} {bound.limit:g}{bound.unit} | {bound.verdict} |"


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(dtype: str, device: str = "cpu") -> str:
    """Describe the machine that a row was measured on, in one cell."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}"
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((ln.split(":")[1].strip() for ln in lines if "model name" in ln), model)
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return f"{model}, {cores} cores, {threads} threads, torch {torch.__version__}, {dtype}"


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder to write")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument(
        "--quick", action="store_true", help="minutes: fewer repetitions and records"
    )


def start(chosen: argparse.Namespace) -> None:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)


# ----------------------------------------------------------------------------------- over seeds


def mean_sd(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation; of one value itself."""
    sd = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{sd}"


def at_least(values: Sequence[float], sign: str = "") -> str:
    """The lower end of Student's 95 % interval of the mean; of one value there is none."""
    n = len(values)
    if n < 2:
        return "–"
    return f"{mean(values) - t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n):{sign}.3f}"


# ------------------------------------------------------------------------- runs that may break off

Results = dict[str, dict[str, dict[str, Any]]]


def resume(
    out: Path,
    pairs: Iterable[tuple[str, str]],
    run: Callable[[str, str], dict[str, Any]],
    table: Callable[[Results], str],
) -> None:
    """`run` each pair that OUT/results.json lacks; results.json and table.md are written after
    each. At the end the table is printed."""
    out.mkdir(parents=True, exist_ok=True)
    results_file = out / "results.json"
    results: Results = json.loads(results_file.read_text()) if results_file.exists() else {}
    for row, column in pairs:
        by_column = results.setdefault(row, {})
        if column not in by_column:
            by_column[column] = run(row, column)
            print(f"{row}, {column}: {json.dumps(by_column[column])}", flush=True)
            results_file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (out / "table.md").write_text(table(results), encoding="utf-8")
    print(table(results))
