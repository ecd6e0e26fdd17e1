"""The contract tests run over an objective or a strategy that is added as a file, as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A copy of a neighbour, under a name that sorts between two others.
ADDED = {"core/objectives": ("orpo", "nearby"), "strategies": ("fedprox", "fedmiddle")}
STRATEGIES, OPTIONS = "tests/strategies/test_strategies.py", "tests/objectives/test_options.py"
CONTRACT = "tests/objectives/test_contract.py"
# Whatever names them, and one contract of each: all of them take minutes.
RUN = "unknown or wrong_option or (fedmiddle and contract) or (nearby and (secret or company))"


def test_a_file_that_is_added_is_tested_without_an_edit(tmp_path: Path) -> None:
    for package, (neighbour, name) in ADDED.items():
        (tmp_path / package).mkdir(parents=True)
        text = (ROOT / "fedtune" / package / f"{neighbour}.py").read_text(encoding="utf-8")
        (tmp_path / package / f"{name}.py").write_text(text, encoding="utf-8")
    words = ["-p", "tests.added", "-p", "no:cacheprovider", "-v", "-k", RUN]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, STRATEGIES, OPTIONS, CONTRACT],
        cwd=ROOT,
        env=os.environ | {"FEDTUNE_ADDED": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    passed = re.findall(r"^(\S+)::(.*) PASSED", done.stdout, re.MULTILINE)
    by_file = {file: [test for name, test in passed if name == file] for file in dict(passed)}
    assert set(by_file) == {STRATEGIES, OPTIONS, CONTRACT}
    for file, name in ((STRATEGIES, "fedmiddle"), (OPTIONS, "nearby"), (CONTRACT, "nearby")):
        assert any(name in test for test in by_file[file])
