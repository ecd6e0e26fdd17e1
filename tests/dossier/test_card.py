"""The cards of a dossier and of an exported model say the same of what the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.core import objectives
from fedtune.core.bases.find import find_base
from fedtune.derive.model_card import write_card
from fedtune.evidence.dossier.card import SECTIONS, card
from fedtune.runs.run import Run
from tests.heads_kit import CAUSAL_LORA, LABELS, REPORT, made_run
from tests.objectives.test_contract import every, plain
from tests.plugins import install

CLASSES, SCORE, TEXT = "text-classification", "text-classification", "text-generation"
# By what an objective trains; one that is added is tested too, by whether it has a head.
EXPECTED = {"classify": CLASSES, "reward": SCORE, "causal_lm": TEXT, "dpo": TEXT, "plugged": SCORE}
PLUGGED = """
from dataclasses import dataclass
from fedtune.core.objectives.reward import Reward

@dataclass(frozen=True)
class Plugged(Reward):
    pass
"""


def tags(run: Run, into: Path) -> tuple[str, str]:
    """The tag of a dossier's card around this run, and of the run's exported model."""
    report: dict[str, Any] = REPORT | {"base": {"name": run.study.base.model}}
    found = {"report.json": report, "plan.json": json.loads(run.study.model_dump_json())}
    content = {"sections": [{"id": name, "title": name, "blocks": []} for name in SECTIONS]}
    into.mkdir()
    write_card(into, run, report, find_base(run.study.base.model))
    exported = (into / "README.md").read_text(encoding="utf-8")
    texts = (card(content, found, run.folder), exported)
    first, second = (yaml.safe_load(text.split("---")[1])["pipeline_tag"] for text in texts)
    return first, second


@pytest.mark.parametrize("labels", [(), LABELS], ids=["no labels", "labels"])
@pytest.mark.parametrize("name", [*objectives.names(), "plugged"])
def test_both_cards_say_whether_the_model_writes_text(
    name: str,
    labels: tuple[str, ...],
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(
        tmp_path / "installed", monkeypatch, "plugged_in", PLUGGED,
        {"fedtune.objectives": {"plugged": "plugged_in:Plugged"}},
    )  # fmt: skip
    known = plain(name, LABELS)
    if known.record_format == "label" and not labels:
        pytest.skip("there is no classifier without classes")
    table = {"name": name, "max_length": 64, "labels": list(labels), "options": every(name)}
    lora = None if known.directions else CAUSAL_LORA
    run = made_run(tmp_path / "run", tiny_base, table, lora=lora)
    headed = run.study.objective.resolved.outputs > 0
    expected = EXPECTED.get(name, CLASSES if headed else TEXT)
    assert tags(run, tmp_path / "model") == (expected, expected)
