"""No bad input to a command ends as an internal error, as a traceback, or without a sentence that
says what to do; and none leaves half a file behind."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from safetensors.numpy import load_file, save_file

from fedtune.cli.exit_codes import command
from fedtune.cli.main import app
from fedtune.core.config import load_study
from fedtune.core.config.sheet import template
from fedtune.core.errors import ConfigError
from fedtune.evidence.dossier.release import details_template, release
from fedtune.flower import enrol
from fedtune.launch import coordinator
from fedtune.server.backup import backup
from fedtune.server.versions import Version, Versions
from tests.cli_kit import tree
from tests.flower import kit
from tests.fuzz import bad_inputs
from tests.fuzz.case import PASSWORD, PRIVATE, Case, nothing
from tests.limits import cpu_limit, memory_limit, wall_limit
from tests.simulated import simulate
from tests.test_cli import run

SECONDS = 60  # of the processor: who works without end is caught
WAITED = 600  # by the clock, of which a loaded machine takes most: who waits for ever is caught
MEMORY = 4 * 2**30  # bytes more than before: who reads without end is caught
STUDY = """
[study]
name = "tiny"
seed = 1
[base]
model = "./base"
dtype = "float32"
[lora]
rank = 2
alpha = 4
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 2
local_steps = 1
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
epsilon = 5.0
delta = 1e-3
unit = "patient"
[strategy]
name = "fedavg"
min_sites = 1
round_timeout = 120
[evaluation]
path = "evaluation.jsonl"
metric = "loss"
columns = { prompt = "q", completion = "a" }
"""
SITE = """
[site]
name = "north"
declared_size = 20
state = "state-north"
[data]
path = "north.jsonl"
columns = { prompt = "q", completion = "a", patient = "who" }
[policy]
bases = "any"
max_epsilon = 8.0
max_delta = 1e-3
max_rank = 64
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Everything that any command reads, whole."""
    world = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        shutil.copytree(tiny_base, "base")
        rows = [{"who": f"p{n}", "q": f"fever on day {n}?", "a": "yn"[n % 2]} for n in range(20)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for name in ("north.jsonl", "evaluation.jsonl", "prompts.jsonl"):
            Path(name).write_text(text.replace('"q"', '"prompt"') if name[0] == "p" else text)
        Path("north.jsonl").write_text(text.replace("fever", PRIVATE))
        Path("study.toml").write_text(STUDY)
        Path("site-north.toml").write_text(SITE)
        Path("keys.txt").write_text("p1\n")
        Path("rubric.txt").write_text("Which is better?\n")
        simulate(Path("study.toml"), [Path("site-north.toml")], Path("run"))
        shutil.copy("run/plan.json", "plan.json")
        release("run", "dossier")
        Path("details.toml").write_text(details_template())
        Path("site-north-sheet.toml").write_text(template())
        _status(Path("run/status.json"))
        shutil.copytree("run", "other")
        adapter = Path("other/adapter/adapter_model.safetensors")
        save_file({n: v + 0.01 for n, v in load_file(adapter).items()}, adapter, {"format": "pt"})
        first = Version(1, "2026-01-05T02:00:00Z", "first", "loss", 1.0)
        Versions(Path("versions")).folder.mkdir(parents=True)
        Versions(Path("versions")).begin(first, lambda draft: draft.mkdir())
        coordinator.prepare(Path("coordinator"), "127.0.0.1", 18999, ["hub.example"])
        for name in ("south", "north"):
            request = kit.ask(kit.site_file(world / "asked" / name, name, 1))
            if name == "south":
                enrol.admit(Path("coordinator"), request, "hub.example:8443")
        shutil.copy("asked/north/request", "north.request")
        backup(load_study(Path("study.toml")), Path("study.toml"), Path("coordinator"),
               Path("run"), Path("hub.backup"))  # fmt: skip
        shutil.rmtree("asked")
    return world


def _status(path: Path) -> None:
    site = {"status": "trained", "reason": "", "epsilon": 1.0, "bytes_up": 5, "bytes_down": 6}
    body = {
        "role": "coordinator",
        "state": "done",
        "sites": {"north": site},
        "rounds": 2,
        "round": 2,
    }
    body |= {"last": [{"time": "2026-01-05T02:00:00Z", "event": "done"}], "study": "tiny"}
    body |= {"quality": {"loss": 1.0}, "seconds": 1.0, "updated": "2026-01-05T02:00:00Z"}
    path.write_text(json.dumps(body | {"next": "2026-01-05T02:00:00Z", "champion": 1}))


@pytest.fixture
def world(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its own, as the working directory; nothing in it reaches a network."""
    here = tmp_path / "w"
    shutil.copytree(good, here, symlinks=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(coordinator, "superlink", _started)
    return here


def _started(*_: Any) -> None:
    raise AssertionError("a bad input came as far as starting processes")


@pytest.fixture
def in_time() -> Iterator[None]:
    """A command that waits, works or reads without end fails alone and not this machine."""
    with memory_limit(MEMORY), cpu_limit(SECONDS), wall_limit(WAITED):
        yield


def ends_well(case: Case, world: Path, on: typer.Typer = app) -> str:
    """What is wrong with how the command ended; "" where all is well."""
    case.damage(world)
    before, kinds = _tree(world), _kinds(world)
    words = list(case.command)
    if words[0] == "admit-rightly":
        request = enrol.read_request(world / "north.request")
        words[:1] = ["admit", "north.request", "--fingerprint", request.fingerprint]
    found = run(*words, on=on)
    return _wrong(found, case) or _left(world, before, found) or _lost(world, kinds, found)


def _wrong(found: Result, case: Case) -> str:
    said = found.stderr.strip().splitlines()
    line = said[-1] if said else ""
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        return f"{type(found.exception).__name__} came out"
    if "internal error" in found.stderr or "Traceback" in found.stderr:
        return line
    if any(word in found.output + found.stderr for word in (PRIVATE, PASSWORD)):
        return "it shows what is private"
    if found.exit_code not in case.codes:
        return f"exit code {found.exit_code}: {line}"
    if any(sign in found.output + found.stderr for sign in ("\x1b[31m", "\x07")):
        return "what a file holds reaches the terminal as it is"
    if found.exit_code == 0 or "Usage:" in found.stderr or "─ Error ─" in found.stderr:
        return ""
    if not line.startswith("fedtune: ") or sum(s.startswith("fedtune: ") for s in said) != 1:
        return f"not one sentence: {found.stderr!r}"
    if not any(sign in line for sign in ("; expected ", "; to do: ", "policy.")):
        return f"neither what was expected nor what to do: {line}"
    return ""


def _tree(world: Path) -> set[str]:
    return {str(path.relative_to(world)) for path in world.rglob("*")}


def _kinds(world: Path) -> dict[str, int]:
    """What lies there under which name, a file, a link or a pipe; without locks and drafts."""
    return {
        str(path.relative_to(world)): stat.S_IFMT(path.lstat().st_mode)
        for path in world.rglob("*")
        if path.name not in ("lock", "status.lock") and path.suffix not in (".new", "-shm", "-wal")
    }


def _left(world: Path, before: set[str], found: Result) -> str:
    """What a failed command left of what it was to make."""
    new = _tree(world) - before
    drafts = [name for name in new if name.endswith(".new") or ".exporting-" in name]
    drafts += [name for name in new if found.exit_code and Path(name).parts[0].startswith("new")]
    return f"left behind: {sorted(drafts)}" if drafts else ""


def _lost(world: Path, before: dict[str, int], found: Result) -> str:
    """What is not there any more, or is something else now, as a pipe that became a file."""
    now = _kinds(world)
    gone = {name for name, kind in now.items() if kind != before.get(name, kind)}
    if found.exit_code:
        gone |= before.keys() - now.keys()
    return f"replaced or removed: {sorted(gone)}" if gone else ""


CASES = bad_inputs.cases()


def test_the_corpus_is_large_and_no_two_are_the_same() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 1500
    commands = {case.command[0] for case in CASES} - {"admit-rightly"}
    every = {*tree(app).commands}  # type: ignore[attr-defined]
    assert every <= commands | {"demo", "more"}  # which read nothing of anybody's


def _shared_out() -> list[Any]:
    """The first of each kind, and of each command, in `make test`; all in `make fuzz`."""
    met: set[str] = set()
    shared = []
    for case in CASES:
        first = {case.kind, f"fedtune {case.command[0]}"} - met
        met |= first
        shared.append(pytest.param(case, id=case.name, marks=() if first else pytest.mark.long))
    return shared


@pytest.mark.parametrize("case", _shared_out())
def test_a_bad_input_is_said(case: Case, world: Path, in_time: None) -> None:
    assert ends_well(case, world) == ""


def _fault(way: str) -> None:
    if way == "fault":
        raise KeyError("x")
    if way == "system":
        raise PermissionError(13, "x")
    if way == "half":
        Path("new.1.new").write_text("half")
        raise ConfigError("it broke", todo="mend it")
    if way == "silent":
        return
    if way == "short":
        raise ConfigError("it broke")
    if way == "terminal":
        print("\x1b[31m")
        raise ConfigError("it broke", todo="mend it")
    if way == "private":
        raise ConfigError(f"{PRIVATE} is there", "a whole one", "mend it")
    if way == "replaced":
        Path("keys.txt").unlink()
        Path("keys.txt").mkdir()
    if way == "removed":
        Path("keys.txt").unlink()
    raise ConfigError("it broke", "a whole one", "mend it")


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("good", ""),
        ("fault", "internal error"),
        ("system", "exit code 4"),
        ("half", "left behind"),
        ("silent", "exit code 0"),
        ("short", "neither what was expected"),
        ("terminal", "reaches the terminal"),
        ("private", "shows what is private"),
        ("replaced", "replaced or removed: ['keys.txt']"),
        ("removed", "replaced or removed: ['keys.txt']"),
    ],
)
def test_a_command_that_ends_otherwise_is_seen(world: Path, way: str, says: str) -> None:
    made = typer.Typer()
    command(made)(_fault)
    found = ends_well(Case(way, nothing, (way,)), world, made)
    assert says in found and bool(says) == bool(found)


def test_a_prompt_that_the_base_cannot_read_is_counted_before_it_is_read(world: Path) -> None:
    for words in (("--prompt", "word " * 2000), ("--prompt", "a", "--max-new-tokens", "9999")):
        found = run("generate", "run", *words)
        assert found.exit_code == 2 and "at most 512 together" in found.stderr, found.stderr
