"""`make bench`: what is whole is kept when it is stopped, and is not measured again."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as bench
from benchmarks.measure import Bound, Table

COPIES = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
STOPS = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(20)"
STEPS, CACHED = (part for part in bench.PARTS if part.module in ("steps", "cached"))


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two benchmarks in place of the six, of which the second is stopped by Ctrl-C the first time;
    the names of those that were started."""
    started: list[str] = []
    made = tmp_path.with_name(tmp_path.name + "-tables")
    for part, value in ((STEPS, 0.5), (CACHED, 2.0)):
        name = part.tables[0]
        table = Table(name, f"Of {name}", [{"what": name}], [Bound(f"{name} holds", value, 1.0)])
        table.save(made / part.module)

    def command(part: bench.Part, quick: bool, common: list[str]) -> list[str]:
        started.append(part.module)
        if started == ["steps", "cached"]:
            return [sys.executable, "-c", STOPS]
        return [sys.executable, "-c", COPIES, str(made / part.module), str(tmp_path)]

    monkeypatch.setattr(bench.Part, "command", command)
    monkeypatch.setattr(bench, "parts", lambda *_: [STEPS, CACHED])
    return started


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(out), *words])
    return bench.main()


def test_what_was_measured_is_kept_when_it_is_stopped(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(monkeypatch, tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    told = capfd.readouterr().out
    assert "[1/2] steps" in told and "--resume measures the rest" in told
    partial = (tmp_path / "all.md").read_text()
    assert "| steps holds | 0.5 | ≤ 1 | met |" in partial and "cached: not run" in partial
    assert "load over 1, 5 and 15 minutes" in partial
    assert run(monkeypatch, tmp_path, "--resume") == 0
    assert ran == ["steps", "cached", "cached"]
    whole = (tmp_path / "all.md").read_text()
    assert "| cached holds | 2 | ≤ 1 | MISSED |" in whole and "1 met, 1 MISSED" in whole
    assert run(monkeypatch, tmp_path) == 0  # without --resume all is measured anew
    assert ran[3:] == ["steps", "cached"]


def test_every_part_has_a_module_and_says_how_long_it_takes() -> None:
    for part in bench.parts(Path("data"), quick=False, device="cpu"):
        assert (Path(bench.__file__).parent / f"{part.module}.py").is_file()
        assert 0 < part.minutes[1] < part.minutes[0]
    assert sum(part.minutes[1] for part in bench.PARTS) <= 10
    assert "epoch" not in {part.module for part in bench.parts(None, quick=True, device="cpu")}
