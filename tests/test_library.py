"""The library: what `import fedtune` offers, and that objects go in and come out."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pandas
import pytest
import typer

import fedtune
from fedtune.core.errors import ConfigError, DataError, InputError
from fedtune.core.registry import process_cache
from fedtune.core.vault.worker import worker
from fedtune.launch.simulate import site_file
from tests.test_end_to_end import lay_out

PRIVATE = '{ noise_multiplier = 2.0, delta = 1e-3, unit = "patient" }'
HEAVY = ("torch", "transformers", "peft", "pydantic", "flwr", "numpy", "pyarrow", "pandas")
# Of commands that are called otherwise; the others' functions have the commands' own names.
FUNCTIONS = {
    "attack": "attack_run",
    "audit": "audit_study",
    "data report": "data_report",
    "data describe": "describe_data",
    "data scan": "data_scan",
    "demo": "run_demo",
    "ledger": "Ledger",
    "log": "verify_log",
    "models fetch": "find_base",
    "models list": "list_bases",
    "models verify": "verify_model",
    "verify": "verify_run",
    "versions": "Versions",
}
# Processes that talk to other machines, and what a person does for them there.
BETWEEN_MACHINES = {
    "admit",
    "backup",
    "client",
    "courier",
    "dashboard",
    "doctor",
    "enroll",
    "evidence",
    "leave",
    "let-go",
    "memberships",
    "restore",
    "revoke",
    "server",
    "vault",
}


def test_exported_members_are_sorted_and_there() -> None:
    assert fedtune.__all__ == sorted(fedtune.__all__)
    for name in fedtune.__all__:
        assert getattr(fedtune, name) is not None
    assert set(fedtune.__all__) <= set(dir(fedtune))
    with pytest.raises(AttributeError, match="no_such_name"):
        fedtune.no_such_name  # noqa: B018


def test_a_type_checker_sees_the_same_members() -> None:
    tree = ast.parse(inspect.getsource(fedtune))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {a.asname or a.name: (i.module, a.name) for i in imports for a in i.names}
    assert seen == fedtune._ORIGINS
    assert {*seen, "__version__"} == set(fedtune.__all__)
    assert (Path(fedtune.__file__).parent / "py.typed").is_file()


def test_no_member_is_called_as_a_module() -> None:
    """An import of the module would put it in the member's place."""
    for name in set(fedtune.__all__) - {"__version__"}:
        assert importlib.util.find_spec(f"fedtune.{name}") is None, name


def test_importing_loads_nothing_of_others() -> None:
    code = f"import fedtune, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = f"import fedtune, sys; fedtune.Study; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'pydantic'" in done.stdout and "'torch'" not in done.stdout


@pytest.mark.parametrize("name", sorted(set(fedtune.__all__) - {"OnEvent", "__version__"}))
def test_a_member_says_what_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    member = getattr(fedtune, name)
    own = (inspect.getdoc(member) or "") if "__doc__" in vars(member) or callable(member) else ""
    assert own and own[0].isupper() and not own.startswith(("As ", "The same", "Of "))
    test = doctest.DocTestParser().get_doctest(own, {}, name, None, None)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(test)
    assert not runner.failures


def commands(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name


def test_every_command_has_a_function() -> None:
    from fedtune.cli.main import app

    names = set(commands(typer.main.get_command(app))) - {"more"}  # which lists commands
    assert names >= BETWEEN_MACHINES and names >= set(FUNCTIONS)
    for name in names - BETWEEN_MACHINES:
        assert FUNCTIONS.get(name, name.replace("-", "_")) in fedtune.__all__, name


# ------------------------------------------------------------------------- objects in and out


def rows(number: int = 40) -> list[dict[str, str]]:
    return [
        {"who": str(n // 2), "q": f"fever day {n}", "a": " yes" if n % 3 else " no"}
        for n in range(number)
    ]


def site(name: str, folder: Path, records: Any = None, **policy: Any) -> fedtune.Site:
    return fedtune.Site.from_records(
        rows() if records is None else records,
        site=fedtune.SiteTable(name=name, declared_size=20, state=folder / name),
        columns=fedtune.Columns(prompt="q", completion="a", patient="who"),
        policy=fedtune.PolicyTable(bases="any", **policy),
    )


def study(base: Path, **tables: Any) -> fedtune.Study:
    tables.setdefault("privacy", fedtune.PrivacyTable(epsilon=5.0, delta=1e-3, unit="patient"))
    return fedtune.Study(
        study=fedtune.StudyTable(name="in-memory"),
        base=fedtune.BaseTable(model=str(base), dtype="float32"),
        lora=fedtune.LoraTable(rank=2, last_layers=1),
        objective=fedtune.ObjectiveTable(name="causal_lm", max_length=64),
        training=fedtune.TrainingTable(rounds=2, sampling_rate=1.0, learning_rate=0.5),
        clipping=fedtune.ClippingTable(),
        strategy=fedtune.StrategyTable(min_sites=2),
        **tables,
    )


def test_a_study_of_data_frames_from_memory_to_a_run(tmp_path: Path, tiny_base: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    columns = fedtune.Columns(prompt="q", completion="a")
    table = fedtune.EvaluationTable(path=held_out, columns=columns)
    frame = pandas.DataFrame(rows())
    sites = [site("north", tmp_path, frame), site("south", tmp_path)]
    texts = [each.data.path.read_text().splitlines() for each in sites]
    assert [*map(json.loads, texts[0])] == [*map(json.loads, texts[1])] == rows()
    assert sites[0].data.path.stat().st_mode & 0o777 == 0o600
    seen: list[str] = []
    run = fedtune.simulate(
        study(tiny_base, evaluation=table),
        sites,
        tmp_path / "run",
        on_event=lambda event, facts: seen.append(event),
    )
    assert seen.count("round") == 2 and seen[-1] == "done"
    assert run.epsilon.keys() == {"north", "south"} and run.private
    assert all(0 < spent <= 5.0 for spent in run.epsilon.values())
    assert {array.dtype.name for array in run.adapter().values()} == {"float32"}
    table = pandas.DataFrame(run.metrics)
    assert table["round"].tolist() == [1, 2] and table["epsilon.north"].is_monotonic_increasing
    assert table["quality.loss"].iloc[-1] == run.report["quality"]["after"]["loss"]
    assert "loss" in run._repr_html_() and repr(fedtune.Run(run.folder)) == repr(run)
    # What lies in the sites' folders now is what the command line runs, too.
    (book,) = {s.name for s in (tmp_path / "north").glob("site.toml")}
    assert fedtune.load_site(tmp_path / "north" / book) == sites[0]
    assert fedtune.purgeable(sites[0]).unknown == []


def test_the_same_objects_give_what_their_files_give(tmp_path: Path, tiny_base: Path) -> None:
    path = lay_out(tmp_path / "files", tiny_base, PRIVATE)
    loaded = fedtune.load_study(path)
    assert fedtune.load_study(fedtune.save(loaded, tmp_path / "again.toml")) == loaded
    from_file = fedtune.load_sites(tmp_path / "files")
    copies = [s.model_copy(update={"coordinator": s.coordinator}) for s in from_file]
    assert copies == from_file
    for original, number in zip(from_file, "ab", strict=True):
        copy = fedtune.save(original, tmp_path / f"{number}.toml")
        assert fedtune.load_site(copy) == original and copy.stat().st_mode & 0o777 == 0o600
    fedtune.simulate(loaded, from_file, tmp_path / "run")
    assert not (tmp_path / "files" / "state-north" / "site.toml").exists()  # the file is read


def test_a_site_that_was_changed_in_memory_is_what_counts(tmp_path: Path, tiny_base: Path) -> None:
    """Not the file that it was loaded from: there the policy would let the study run."""
    path = lay_out(tmp_path, tiny_base, '{ epsilon = 5.0, delta = 1e-3, unit = "patient" }')
    sites = fedtune.load_sites(tmp_path)
    policy = sites[0].policy.model_copy(update={"max_epsilon": 0.5})
    strict = sites[0].model_copy(update={"policy": policy})
    with pytest.raises(fedtune.FedtuneError, match="min_sites = 2"):
        fedtune.simulate(fedtune.load_study(path), [strict, sites[1]], tmp_path / "run")
    assert fedtune.load_site(site_file(strict)).policy.max_epsilon == 0.5
    fedtune.simulate(fedtune.load_study(path), sites, tmp_path / "run")


def test_a_changed_copy_is_checked(tmp_path: Path, tiny_base: Path) -> None:
    made = study(tiny_base)
    training = made.training.model_copy(update={"learning_rate": -1.0})
    wrong = made.model_copy(update={"training": training})
    with pytest.raises(ConfigError, match=r"study in-memory: training\.learning_rate"):
        fedtune.simulate(wrong, [site("north", tmp_path), site("south", tmp_path)])
    with pytest.raises(ConfigError, match=r"study in-memory: training\.learning_rate"):
        fedtune.plan(wrong, [20])


def test_two_sites_never_share_a_ledger(tmp_path: Path, tiny_base: Path) -> None:
    north = site("north", tmp_path)
    table = north.site.model_copy(update={"name": "south"})
    twin = north.model_copy(update={"site": table})
    with pytest.raises(fedtune.FedtuneError) as error:
        fedtune.simulate(study(tiny_base), [north, twin], tmp_path / "run")
    assert "both keep their ledger in" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", [{"q": object()}, ["q"], {"q": float("nan")}])
def test_what_is_no_record_is_said_without_its_content(tmp_path: Path, row: Any) -> None:
    with pytest.raises(DataError, match="row 2 is not a record") as error:
        site("north", tmp_path, [rows(1)[0], row])
    assert "fever" not in str(error.value) and not (tmp_path / "north").exists()


def test_a_run_again_in_one_process_has_another_coordinator(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Each run folder has a key of its own, and the sites' workers are still there."""
    path = lay_out(tmp_path, tiny_base, PRIVATE)
    loaded, sites = fedtune.load_study(path), fedtune.load_sites(tmp_path)

    def stop(event: str, facts: dict[str, Any]) -> None:
        if event == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedtune.simulate(loaded, sites, tmp_path / "first", on_event=stop)
    before = worker(str(sites[0].file))
    try:
        run = fedtune.simulate(loaded, sites, tmp_path / "second")
    except fedtune.FedtuneError as error:
        pytest.fail(str(error))
    assert worker(str(sites[0].file)) is before  # what was read stays
    assert len(run.metrics["round"]) == 3
    resumed = fedtune.simulate(loaded, sites, tmp_path / "first", resume=True)
    assert len(resumed.metrics["round"]) == 3


def test_a_site_whose_file_changed_is_read_anew(tmp_path: Path, tiny_base: Path) -> None:
    path = lay_out(tmp_path, tiny_base, PRIVATE)
    fedtune.simulate(fedtune.load_study(path), fedtune.load_sites(tmp_path), tmp_path / "first")
    file = tmp_path / "site-north.toml"
    before = worker(str(file))
    file.write_text(file.read_text().replace("declared_size = 20", "declared_size = 22"))
    run = fedtune.simulate(
        fedtune.load_study(path), fedtune.load_sites(tmp_path), tmp_path / "second"
    )
    assert worker(str(file)) is not before
    assert worker(str(file)).site.site.declared_size == 22
    assert len(run.metrics["round"]) == 3


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        fedtune.Run(tmp_path)
    with pytest.raises(InputError, match="not a run folder"):
        fedtune.Run(tmp_path / "none")


def test_a_run_that_goes_on_has_metrics_and_no_report(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "plan.json").write_text(study(tiny_base).model_dump_json())
    run = fedtune.Run(tmp_path)
    with pytest.raises(InputError, match="report of a finished run"):
        run.epsilon  # noqa: B018
    assert "not finished" in run._repr_html_()
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "epsilon": {"a": 1.5}}\n')
    assert run.metrics == {"round": [1, 2], "epsilon.a": [None, 1.5]}
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n[2]\n')
    with pytest.raises(InputError, match="not valid JSON lines"):
        run.metrics  # noqa: B018


def test_caches_of_the_process_are_emptied_by_name() -> None:
    found: dict[str, int] = process_cache.register("a test's", {})
    calls: list[int] = []

    @process_cache.cached("a test's function")
    def square(number: int) -> int:
        calls.append(number)
        return number * number

    found["one"] = square(3) + square(3)
    assert calls == [3]
    process_cache.clear("a test's")
    assert not found and square(3) == 9 and calls == [3]
    process_cache.clear("a test's function")
    assert square(3) == 9 and calls == [3, 3]
    with pytest.raises(KeyError):
        process_cache.clear("no such cache")
