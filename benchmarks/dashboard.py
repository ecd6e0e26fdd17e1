"""Measure the dashboard on a study of 10,000 rounds and 200 sites: time to paint, memory.

    python -m benchmarks.dashboard [--rounds 10000] [--sites 200] [--visits 5]

A run's folder is written with metrics.jsonl and status.json as a coordinator writes them, `fedtune
dashboard` serves it, and a real browser visits: at once, while the rounds are still being read, and
when they are. Times are the browser's own, from the navigation's start. Needs chromium and
playwright (fedtune[browser]).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedtune.observe import StatusFile

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
READY = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
DRAWN = "document.documentElement.dataset.drawn"


def write(run: Path, rounds: int, sites: int) -> None:
    """Write a run that still goes on, with every site in every round."""
    names = [f"site-{number:03d}" for number in range(sites)]
    status = StatusFile(run)
    status("start", {"study": "large", "done": 0, "rounds": rounds + 1000, "private": True})
    with (run / "metrics.jsonl").open("w") as file:
        for number in range(1, rounds + 1):
            share = number / rounds
            entry: dict[str, Any] = {"round": number, "seconds": 31.25, "missing": {}, "late": {}}
            entry |= {"participants": names, "bytes_up": dict.fromkeys(names, 31700)}
            entry |= {"bytes_down": dict.fromkeys(names, 42500)}
            spent = 8 * math.sqrt(share)
            entry["epsilon"] = {n: spent * (0.9 + at / sites / 10) for at, n in enumerate(names)}
            entry["quality"] = {"loss": 1 + 2 * math.exp(-4 * share), "accuracy": share / 2}
            file.write(json.dumps(entry, sort_keys=True) + "\n")
    status("round", entry)


def peak(process: int) -> float:
    """The most memory that a process has had, in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", text)[0]) / 1024


def visit(browser: Any, address: str, rounds: int | None) -> dict[str, float]:
    """Visit once in a browser without a cache. rounds: wait until so many are drawn."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(address, wait_until="domcontentloaded")
    page.click("#theme")  # answers: the page is interactive
    found = {"answers": page.evaluate("performance.now()"), "ready": page.evaluate(READY)}
    while (painted := page.evaluate(PAINTED)) is None:
        page.wait_for_timeout(10)
    while rounds and page.evaluate(DRAWN) != str(rounds):
        page.wait_for_timeout(10)
    found |= {"painted": painted, "drawn": page.evaluate("performance.now()")}
    context.close()
    return {name: value / 1000 for name, value in found.items()}


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("rounds", 10_000), ("sites", 200), ("visits", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        write(run, asked.rounds, asked.sites)
        size = (run / "metrics.jsonl").stat().st_size / 1e6
        words = [sys.executable, "-m", "fedtune.cli.main", "dashboard", str(run)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert server.stdout
            address = next(line.strip() for line in server.stdout if line.startswith("http"))
            began = time.monotonic()
            with sync_playwright() as playwright:
                options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
                browser = playwright.chromium.launch(**options)
                visit(browser, address, None)  # the browser's own first start
                load = f"{size:.0f} MB; load {os.getloadavg()[0]:.1f}"
                print(f"{asked.rounds:,} rounds, {asked.sites} sites, {load}\n")
                print("| | first paint | interactive | curves |")
                print("|---|---:|---:|---:|")
                show("rounds still being read", visit(browser, address, asked.rounds))
                read = time.monotonic() - began
                visits = [visit(browser, address, asked.rounds) for _ in range(asked.visits)]
                for label, pick in (("rounds read, median", middle), ("slowest", max)):
                    names = visits[0]
                    show(label, {n: pick([v[n] for v in visits]) for n in names})
            print(f"\nread after {read:.1f} s; server's peak {peak(server.pid):.0f} MiB")
        finally:
            server.terminate()
            server.wait()


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def show(label: str, found: dict[str, float]) -> None:
    times = (found["painted"], max(found["ready"], found["answers"]), found["drawn"])
    print(f"| {label} | " + " | ".join(f"{value:.2f} s" for value in times) + " |")


if __name__ == "__main__":
    main()
