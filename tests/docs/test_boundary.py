"""fedtune/core is what a site's vault loads, and the page of what must be right names each file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from fedtune.server.admission import plan_message
from tests.docs import boundary
from tests.docs.vault_alone import NO_SELF_TEST
from tests.guarantee.property_files import WRITERS, bases_of
from tests.guarantee.property_plans import (
    CLASSIFIES,
    COLUMNS,
    PEERS,
    Place,
    Plan,
    begun,
    digest_of,
    path_of,
)
from tests.media import image, recording

NUMBERS = re.compile(r"(?<=\| )[\d,]+(?= \|)")
OFF = 0.05  # of all lines that the page counts: a change of a few lines does not make it stale
CHILD = Path(__file__).with_name("vault_alone.py")
AS_OURS = """
import runpy, sys
from fedtune.core import boot
boot.hide_quantisation()  # as every program of ours does before it imports the rest
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


USUAL_PLACE = Place()


@dataclass(frozen=True)
class Story:
    """What a study's sites do in a process of their own, and what is said of each step."""

    plan: Plan
    steps: tuple[str, ...]
    said: tuple[str, ...]
    place: Place = USUAL_PLACE
    kind: str = "jsonl"  # of the file of records


ROUND, DONE = ("prepare", "train"), ("admitted", "trained")
USUAL = Story(Plan(), ROUND, DONE)


def of(objective: str, kind: str = "jsonl", columns: str = "", **how: Any) -> Story:
    place = Place(COLUMNS[columns or objective])
    return Story(Plan(objective, objective, **how), ROUND, DONE, place, kind)


STORIES = {
    "an adapter": replace(
        USUAL,
        steps=("prepare", "train", "restart", "prepare", "train"),
        said=("admitted", "trained", "restarted", "admitted", "trained"),
    ),
    "a head alone": of("classify", "csv", lora="none"),
    "an encoder's head": of("classify", base="bert", lora="none"),
    "preferences": of("dpo", "parquet"),
    "class sums": of("prototypes", "sqlite", lora="none"),
    "a base as teacher": of("distill", teacher="llama"),
    "a run as teacher": of("distill", columns="classify", teacher=CLASSIFIES),
    "images": of("causal_lm", base="llava", columns="image"),
    "recordings": of("causal_lm", base="whisper", columns="audio"),
    "the other engine": of("causal_lm", engine="opacus", lora="whole"),
    "no last round": of("causal_lm", life=50.0),
    "a query": Story(
        Plan(queries=True),
        ("prepare", "evaluate"),
        ("admitted", "answered"),
        Place(held_out="held"),
    ),
    "shared noise": Story(
        Plan(shared=True),
        ("prepare", "ready", "masked"),
        ("admitted",) * 3 + ("ready",) * 3 + ("masked",) * 3,
    ),
    "a refusal": replace(
        USUAL,
        steps=("prepare",),
        said=("policy.max_epsilon_per_study",),
        place=Place(policy="max_epsilon = 0.01\nmax_epsilon_per_study = 0.01"),
    ),
    "nobody has signed": replace(
        USUAL,
        steps=("prepare",),
        said=("waiting: policy.admission",),
        place=Place(policy='admission = "signed"'),
    ),
    "an answer that waits": replace(
        USUAL,
        said=("admitted", "waiting: policy.answers"),
        place=Place(policy='answers = "held"'),
    ),
    "a draw that waits": Story(
        Plan(shared=True),
        ("prepare", "ready"),
        ("admitted",) * 3 + ("waiting: policy.answers",) * 3,
        Place(policy='answers = "held"'),
    ),
    "no file": replace(
        USUAL, steps=("lose_records", "prepare"), said=("lost", "failed")
    ),
    "a file that goes": replace(
        USUAL,
        steps=("prepare", "lose_records", "train"),
        said=("admitted", "lost", "trained"),
    ),
    "a broken ledger": replace(
        USUAL,
        steps=("prepare", "break_ledger", "train"),
        said=("admitted", "broken", "failed"),
    ),
}  # fmt: skip


def rows(folder: Path, story: Story, data: str) -> list[dict[str, Any]]:
    """Two records of each of six patients; of a base that reads files, with a file each."""
    made = []
    for n in range(12):
        row = {
            "who": f"{data}-{n // 2}",
            "q": f"fever, day {n}",
            "a": "yn"[n % 2],
            "b": "ny"[n % 2],
        }
        if story.plan.base == "llava":
            row["file"] = image(folder / data / f"{n}.png", n)
        if story.plan.base == "whisper":
            row["file"] = recording(folder / data / f"{n}.wav", n)
        made.append(row)
    return made


def lay_out(folder: Path, story: Story, bases: Mapping[str, Path]) -> None:
    """Write a study's plan, its arrays, its sites and their records, as vault_alone.py reads
    them."""
    made = begun(story.plan, tuple(sorted(bases.items())))
    coordinator = SigningKey.at(folder.parent / "coordinator.key")
    folder.mkdir()
    plan = plan_message(made.study, made.frozen, coordinator).config_records["plan"]
    (folder / "plan.json").write_text(json.dumps(dict(plan)))
    for name, arrays in (("frozen", made.frozen), ("adapter", made.adapter)):
        save_file(dict(arrays), folder / f"{name}.safetensors")
    (folder / "steps.json").write_text(json.dumps(story.steps))
    data = [name for name in (story.place.data, story.place.held_out) if name]
    kinds = dict.fromkeys(data, story.kind)
    for name in data:
        path = folder / path_of(name, kinds)
        path.parent.mkdir()
        path.write_bytes(WRITERS[story.kind](rows(folder, story, name), True))
    teacher = story.plan.teacher
    text = story.place.toml(kinds, [digest_of(str(bases[teacher]))] if teacher else [])
    names = "abc" if story.plan.shared else "a"
    for name in names:
        mine = text.replace('name = "a"', f'name = "{name}"').replace(
            'state = "state"', f'state = "state-{name}"'
        )
        peers = [Ledger(folder / f"state-{peer}").key.public for peer in names if peer != name]
        for played, own in zip(PEERS, peers, strict=False):
            mine = mine.replace(played.public, own)
        (folder / f"site-{name}.toml").write_text(mine)


def alone(folder: Path, *beside: str) -> dict[str, Any]:
    """What vault_alone.py prints of the studies in a folder."""
    command = [sys.executable, "-c", AS_OURS, CHILD, folder, *beside]
    done = subprocess.run(command, capture_output=True, text=True, cwd=boundary.ROOT)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def not_on_the_page(loaded: list[str]) -> set[str]:
    return set(loaded) - {module.name for module in boundary.modules()}


SOME = ("an adapter", "shared noise")
TESTED = ("an adapter",)  # by the self-test too, as all are at length


@pytest.mark.parametrize(
    "stories", [SOME, pytest.param(tuple(STORIES), marks=pytest.mark.long)], ids=["some", "all"]
)
def test_a_vault_loads_nothing_that_the_page_does_not_name(
    stories: tuple[str, ...], tmp_path: Path, tiny_base: Path, tiny_encoder: Path
) -> None:
    bases = bases_of(tmp_path, tiny_base, tiny_encoder)
    (sites := tmp_path / "sites").mkdir()
    for name in stories:
        lay_out(sites / name, STORIES[name], bases)
        if stories == SOME and name not in TESTED:
            (sites / name / NO_SELF_TEST).touch()
    found = alone(sites)
    for name in stories:
        story, said = STORIES[name], found["said"][name]
        assert len(said) == len(story.said), (name, said)
        for expected, heard in zip(story.said, said, strict=True):
            assert expected in heard, (name, said)
    assert not_on_the_page(found["loaded"]) == set()
    assert not {"flwr", "grpc"} & set(found["others"])  # nor any network's library


@pytest.mark.parametrize("module", ["fedtune.report.claim", "fedtune.officer.review"])
def test_twin_a_module_that_is_loaded_beside_a_vault_is_found(tmp_path: Path, module: str) -> None:
    assert module in not_on_the_page(alone(tmp_path, module)["loaded"])


def test_the_core_holds_nothing_that_a_vault_cannot_load() -> None:
    loaded = {name for name in boundary.reached(boundary.beginnings()) if boundary.is_ours(name)}
    assert {module.name for module in boundary.modules()} == loaded


def test_twin_a_program_of_another_part_reaches_what_is_not_in_the_core() -> None:
    loaded = {
        name for name in boundary.reached(["fedtune.courier.process"]) if boundary.is_ours(name)
    }
    assert loaded - {module.name for module in boundary.modules()}


def test_the_page_is_what_the_imports_say() -> None:
    """Its figures may be a few lines behind."""
    written, now = boundary.PAGE.read_text(encoding="utf-8"), boundary.page()
    assert NUMBERS.sub("", written) == NUMBERS.sub("", now), "run python -m tests.docs.boundary"
    (counted,), (lines,) = (
        re.findall(r"\*\*all\*\* .* ([\d,]+) \|", text) for text in (written, now)
    )
    before, after = (int(figure.replace(",", "")) for figure in (counted, lines))
    assert abs(after - before) <= OFF * before, "run python -m tests.docs.boundary"


def test_every_part_has_files_and_every_distribution_a_reason() -> None:
    parts = {module.part for module in boundary.modules()}
    assert parts == {title for title, _, _ in boundary.PARTS}
    assert set(boundary.others()) == set(boundary.OTHERS)
