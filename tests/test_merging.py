"""Merged runs: from two finished studies to a folder that plain PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedtune.core.config import DataFile
from fedtune.core.errors import ConfigError, InputError
from fedtune.core.run_folder import load_plan
from fedtune.derive.merge import merge_runs
from fedtune.evaluation.generate import generate
from fedtune.evaluation.run import evaluate
from fedtune.officer.site_files import sites_in
from fedtune.runs.run import Run
from tests.simulated import simulate
from tests.test_cli import run
from tests.test_end_to_end import by_the_library, lay_out

PRIVACY = "{ epsilon = 1.5, delta = 1e-3, unit = 'patient' }"


def study(folder: Path, base: Path, name: str, **changes: str) -> Path:
    """A finished run of the two sites in `folder`; a second one with other settings."""
    path = lay_out(folder, base, changes.pop("privacy", PRIVACY))
    text = path.read_text().replace('name = "small"', f'name = "{name}"')
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    out = folder / name
    simulate(path, sites_in(folder), out)
    return out


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("parents")
    one = study(folder, tiny_base, "one")
    other = study(
        folder, tiny_base, "other", rank="rank", **{"rank = 4": "rank = 3", '"q_proj", ': ""}
    )
    return [one, other]


@pytest.fixture(scope="module")
def merged(parents: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "both"
    merge_runs([*map(Run, parents)], out)
    return out


def body(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What merging the adapter into the base changes, by plain PEFT."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    whole = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    return {n: p.detach() - before[n] for n, p in whole.named_parameters()}


def test_plain_peft_loads_it_and_it_is_the_sum_of_its_parents(
    parents: list[Path], merged: Path, tiny_base: Path
) -> None:
    one, other, both = (deltas(tiny_base, p / "adapter") for p in (*parents, merged))
    moved = [name for name in both if both[name].abs().max() > 0]
    assert len(moved) == 4
    for name in both:
        assert torch.allclose(both[name], one[name] + other[name], atol=1e-6)
    (shared, *_) = (name for name in moved if "down_proj" in name)
    assert not torch.allclose(both[shared], one[shared], atol=1e-6)


def test_its_report_names_its_parents_and_composes_their_budgets(
    parents: list[Path], merged: Path
) -> None:
    found = body(merged)
    assert [p["plan_digest"] for p in found["merge"]["parents"]] == [
        load_plan(parent).digest for parent in parents
    ]
    digests = {p["adapter_digest"] for p in found["merge"]["parents"]}
    assert len(digests) == 2 and all(d.startswith("sha256:") for d in digests)
    events: dict[tuple[float, float, int], int] = {}
    for parent in parents:
        site = body(parent)["privacy"]["sites"]["north"]
        key = (site["noise_multiplier"], site["sampling_rate"], 1)
        events[key] = events.get(key, 0) + site["steps"]
    expected = by_the_library(tuple(events.items()), 1e-3)
    assert abs(found["privacy"]["epsilon"] - expected) <= 2e-3 * expected
    assert found["privacy"]["epsilon"] > 1.1 * body(parents[0])["privacy"]["epsilon"]
    text = (merged / "report.md").read_text()
    assert "Merged from 2 runs" in text and "the same site took part in both" in text
    assert "Nobody: every site" not in text and "None was completed" not in text
    assert {p.name for p in merged.iterdir()} == {
        "adapter", "checkpoint", "plan.json", "report.json", "report.md", "progress.png"
    }  # fmt: skip


def test_what_was_kept_is_measured_on_each_parents_own_records(merged: Path) -> None:
    kept = body(merged)["merge"]["kept"]
    assert [each["parent"] for each in kept] == [1, 2]
    for each in kept:
        gain = each["alone"] - each["base"]
        assert each["kept"] == pytest.approx((each["merged"] - each["base"]) / gain)


def test_the_other_commands_read_it_as_a_run(parents: list[Path], merged: Path) -> None:
    table = load_plan(merged).evaluation
    assert table is not None
    found = evaluate(Run(merged), DataFile(path=table.path, columns=table.columns))
    (kept, _) = body(merged)["merge"]["kept"]
    assert found["after"]["loss"] == pytest.approx(kept["merged"], rel=1e-5)
    before, after = generate(Run(merged), "fever", 4, chat=False)
    assert isinstance(before, str) and isinstance(after, str)


@pytest.mark.long
def test_regmean_asks_each_parents_public_text(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "studies"
    public = """
[public]
path = "test.jsonl"
licence = "CC0-1.0"
columns = { prompt = "q" }
[strategy]"""
    changes = {"[strategy]": public, "last_layers = 2": 'last_layers = 2\na_init = "public"'}
    runs = [study(folder, tiny_base, "first", **changes)]
    runs.append(study(folder, tiny_base, "second", **changes, **{"rank = 4": "rank = 3"}))
    found = merge_runs([*map(Run, runs)], tmp_path / "out", method="regmean").report
    assert found["merge"]["rank"] == 7
    one, other, both = (deltas(tiny_base, p / "adapter") for p in (*runs, tmp_path / "out"))
    name = next(n for n in both if both[n].abs().max() > 0)
    assert not torch.allclose(both[name], one[name] + other[name], atol=1e-4)
    (folder / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match="needs the public text"):
        merge_runs([*map(Run, runs)], tmp_path / "again", method="regmean")


def test_a_parent_without_privacy_makes_the_merger_not_private(
    tmp_path: Path, tiny_base: Path, parents: list[Path]
) -> None:
    leaky = study(tmp_path / "leaky", tiny_base, "leaky", privacy='"off"')
    found = merge_runs([Run(parents[0]), Run(leaky)], tmp_path / "out", measure=False).report
    assert not found["private"]
    assert "NOT PRIVATE" in (tmp_path / "out" / "report.md").read_text()
    assert "leaky" in found["privacy"]["warning"]


def test_parents_of_other_bases_are_refused(tmp_path: Path, parents: list[Path]) -> None:
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in ("report.json", "adapter"):
        (twin / name).symlink_to(parents[1] / name)
    plan = json.loads((parents[1] / "plan.json").read_text())
    plan["base"]["digest"] = "sha256:" + "0" * 64
    (twin / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="different bases"):
        merge_runs([Run(parents[0]), Run(twin)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_leave_nothing(tmp_path: Path, parents: list[Path], merged: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="exists"):
        merge_runs([*map(Run, parents)], merged)
    with pytest.raises(ConfigError, match="two or more"):
        merge_runs([Run(parents[0])], out)
    with pytest.raises(ConfigError, match="the same adapter"):
        merge_runs([Run(parents[0]), Run(parents[0])], out)
    with pytest.raises(InputError, match="not a run folder"):
        merge_runs([Run(parents[0]), Run(tmp_path)], out)
    with pytest.raises(ConfigError, match="one weight for each"):
        merge_runs([*map(Run, parents)], out, weights=[1.0])
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path, parents: list[Path]) -> None:
    out = tmp_path / "both"
    names = [str(parent) for parent in parents]
    done = run("merge", *names, "--out", str(out), "--weights", "1,0.5", "--disjoint")
    assert done.exit_code == 0, done.output
    found = body(out)
    assert found["merge"]["weights"] == [1.0, 0.5]
    worst = max(body(parent)["privacy"]["epsilon"] for parent in parents)
    assert found["privacy"]["epsilon"] == pytest.approx(worst, rel=1e-3)
    assert "stated to share no person" in (out / "report.md").read_text()
    assert run("merge", *names, "--out", str(out)).exit_code == 2
    assert run("merge", *names, "--out", f"{out}-2", "--weights", "one,two").exit_code == 2
