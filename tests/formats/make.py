"""Make one set of what fedtune keeps on disk: two sites, and the runs of four small studies.

    python -m tests.formats.make NAME

Writes tests/formats/data/NAME, once: a later change of a format adds a set beside the others, and
none is ever made again, so that whatever a released version wrote stays readable. The studies run
in FOLDER, because a checkpoint names the absolute path of its evaluation records.

    tiny/ *.jsonl *.toml    the base, synthetic records, the plans and the sites' files
    state-north/ -south/    each site's ledger, its charges by every study, and its step log
    notes/ triage/ daily/   finished runs: a language model, a classifier, one with a [schedule]
    broken/                 a run that was interrupted after its first round of three
    expected.json           what the release that made them read back"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedtune.observe import observer
from tests.conftest import tiny_llama
from tests.formats.read_back import expected
from tests.simulated import simulate

DATA = Path(__file__).parent / "data"
FOLDER = Path("/tmp/fedtune-formats")
FEDTUNE = "from fedtune.cli.main import main; main()"
NAMES = ("north", "south")
STUDY = """
[study]
name = "{name}"
[base]
model = "tiny"
dtype = "float32"
[lora]
rank = 1
alpha = 2
modules = ["q_proj"]
last_layers = 1
[objective]
name = "{objective}"
max_length = 32
[training]
{rounds}
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
delta = 1e-4
noise_multiplier = 4.0
unit = "patient"
{epsilon}
[strategy]
weights = "equal"
min_sites = 2
[evaluation]
path = "public.jsonl"
columns = {{ {columns} }}
metric = "{metric}"
"""
SCHEDULE = """
[schedule]
every = "1h"
start = "2026-01-05T00:00:00Z"
"""
SITE = """
[site]
name = "{name}"
declared_size = 12
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ {columns}, patient = "who" }}
[policy]
bases = "any"
max_epsilon = 20.0
"""
TEXT = 'prompt = "q", completion = "a"'
LABEL = 'text = "q", label = "a"'


def lay_out(folder: Path) -> None:
    """The base, the records, and every toml file."""
    tiny_llama(folder / "tiny", hidden=16, layers=1)
    for name in (*NAMES, "public"):
        grow(folder / f"{name}.jsonl", range(12))
    for name in NAMES:
        for kind, columns in (("site", TEXT), ("labels", LABEL)):
            text = SITE.format(name=name, columns=columns)
            (folder / f"{kind}-{name}.toml").write_text(text)
    words = {"objective": "causal_lm", "metric": "loss", "columns": TEXT}
    classes = {"objective": 'classify"\nlabels = ["yes", "no"]\n#"', "metric": "accuracy"}
    plans = {
        "notes": {**words, "rounds": "rounds = 2", "epsilon": ""},
        "triage": {**classes, "columns": LABEL, "rounds": "rounds = 2", "epsilon": ""},
        "daily": {**words, "rounds": "", "epsilon": "epsilon = 3.0"},
        "broken": {**words, "rounds": "rounds = 3", "epsilon": ""},
    }
    for name, about in plans.items():
        text = STUDY.format(name=name, **about) + (SCHEDULE if name == "daily" else "")
        (folder / f"{name}.toml").write_text(text)


def grow(path: Path, patients: range) -> None:
    with path.open("a") as file:
        for p in patients:
            row = {"who": f"patient-{p}", "q": f"fever on day {p}", "a": ("yes", "no")[p % 2]}
            file.write(json.dumps(row) + "\n")


def command(*words: str) -> None:
    """Run `fedtune` in a process of its own, so that a run is resumed as after a restart."""
    subprocess.run([sys.executable, "-c", FEDTUNE, *words], check=True)


def run_all() -> None:
    """Every study, in the working directory."""
    sites = [word for name in NAMES for word in ("--sites", f"site-{name}.toml")]
    labels = [word for name in NAMES for word in ("--sites", f"labels-{name}.toml")]
    command("simulate", "notes.toml", *sites, "--out", "notes")
    command("review", "triage.toml", "--site", "labels-north.toml", "--sign")
    command("simulate", "triage.toml", *labels, "--out", "triage")
    daily = ("simulate", "daily.toml", *sites, "--out", "daily", "--rounds")
    command(*daily, "2")
    grow(Path("north.jsonl"), range(12, 15))
    command(*daily, "3", "--resume")
    Path("leaves.txt").write_text("patient-3\n")
    command("withdraw", "site-north.toml", "--file", "leaves.txt")
    interrupted(Path("broken.toml"), [Path(f"site-{name}.toml") for name in NAMES])


def interrupted(study: Path, sites: list[Path]) -> None:
    """The study, up to Ctrl-C after its first round."""

    def stop(kind: str, _: dict[str, Any]) -> None:
        if kind == "round":
            raise KeyboardInterrupt

    try:
        with observer("coordinator", Path("broken"), then=stop) as seen:
            simulate(study, sites, Path("broken"), on_event=seen)
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing stopped it")


def main(name: str) -> None:
    home = DATA / name
    assert not home.exists() and not FOLDER.exists(), "a set is made once, in a folder of its own"
    FOLDER.mkdir()
    os.environ["PYTHONPATH"] = os.getcwd()
    os.chdir(FOLDER)
    os.environ |= {"FEDTUNE_CACHE": str(FOLDER / "cache"), "LOGNAME": "officer"}
    lay_out(FOLDER)
    run_all()
    text = json.dumps(expected(FOLDER), indent=1, sort_keys=True)
    (FOLDER / "expected.json").write_text(text + "\n")
    # A picture of the report's figures is a third of a set, and no command reads it.
    ignored = shutil.ignore_patterns("cache", "progress.png")
    shutil.copytree(FOLDER, home, symlinks=True, ignore=ignored)


if __name__ == "__main__":
    main(sys.argv[1])
