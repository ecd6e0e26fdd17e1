"""What a study may ask of an objective; what it may not says what to do."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedtune.core import objectives
from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import Columns, DataFile, LoraTable, ObjectiveTable, PolicyTable
from fedtune.core.data.load import check_columns
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.objectives.distill import Distill
from fedtune.core.objectives.dpo import DPO
from fedtune.core.vault.policy import _about_plugins, may_resolve
from tests.dp.conftest import study
from tests.objectives.test_contract import every, plain

WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown objective": ("ppo", {}, "one of " + ", ".join(objectives.names())),
    "unknown option": ("dpo", {"bet": 1.0}, "one of beta, label_smoothing, variant"),
    "no options": ("causal_lm", {"beta": 1.0}, "no options"),
    "a word for a number": ("kto", {"beta": "much"}, "the type of its default, 0.1"),
    "a number for a word": ("dpo", {"variant": 1.0}, "the type of its default, 'sigmoid'"),
    "not a number": ("kto", {"beta": math.nan}, "a finite number"),
    "not finite": ("orpo", {"weight": math.inf}, "a finite number"),
    "a part of a direction": ("prototypes", {"directions": 1.5}, "a whole number"),
    "a part of a token": ("distill", {"top": 2.5}, "a whole number"),
    "beta": ("dpo", {"beta": 0.0}, "a number above 0"),
    "smoothing": ("dpo", {"label_smoothing": 0.5}, "at least 0 and below 0.5"),
    "variant": ("dpo", {"variant": "hinge"}, "sigmoid or ipo"),
    "ipo has no smoothing": (
        "dpo", {"variant": "ipo", "label_smoothing": 0.1}, 'variant = "sigmoid"',
    ),
    "desirable": ("kto", {"lambda_desirable": 0.0}, "a number above 0"),
    "undesirable": ("kto", {"lambda_undesirable": -1.0}, "a number above 0"),
    "reference point": ("kto", {"reference_point": -0.1}, "at least 0"),
    "weight": ("orpo", {"weight": -1.0}, "from 0 to 100"),
    "margin": ("reward", {"margin": -1.0}, "from 0 to 100"),
    "centring": ("reward", {"centring": -0.1}, "from 0 to 100"),
    # What turns the last digits of a record's outputs into another gradient:
    "a large beta": ("dpo", {"beta": 101.0}, "at most 100"),
    "a large beta of kto": ("kto", {"beta": 1e9}, "at most 100"),
    "a large lambda": ("kto", {"lambda_desirable": 1e9}, "at most 100"),
    "a large weight": ("orpo", {"weight": 1e9}, "from 0 to 100"),
    "a large margin": ("reward", {"margin": 1e9}, "from 0 to 100"),
    "a large centring": ("reward", {"centring": 1e9}, "from 0 to 100"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_option_names_itself_and_what_would_do(how: str) -> None:
    name, options, expected = WRONG[how]
    with pytest.raises(ConfigError) as caught:
        _ = ObjectiveTable.model_construct(name=name, options=options, labels=()).resolved
    assert expected in str(caught.value)
    assert (next(iter(options)) if options else "ppo") in str(caught.value)


def test_a_whole_number_that_a_plan_wrote_as_a_float_is_one() -> None:
    table = ObjectiveTable(name="prototypes", options={"directions": 8.0, "count_weight": 2})
    directions = table.resolved.directions  # type: ignore[attr-defined]
    assert (directions, type(directions)) == (8, int)


def test_a_studys_objective_is_resolved_once_and_is_no_value_of_the_plan() -> None:
    """What a copy that names another objective trains is the other one."""
    asked = study(objective={"name": "dpo", "options": {"beta": 0.5}}, lora=LoraTable())
    apart, written = pickle.loads(pickle.dumps(asked)), asked.model_dump_json()
    found = asked.objective.resolved
    assert asked.objective.resolved is found
    renamed = asked.objective.model_copy(update={"name": "orpo", "options": {}})
    assert (type(renamed.resolved).__name__, type(found).__name__) == ("ORPO", "DPO")
    weaker = asked.changed(objective={"options": {"beta": 0.25}})
    assert (weaker.objective.resolved, found) == (DPO(beta=0.25), DPO(beta=0.5))
    assert asked.model_copy(update={"base": asked.base}).objective.resolved is found
    assert asked == apart and asked.model_dump_json() == written
    for copy in (deepcopy(asked), pickle.loads(pickle.dumps(asked))):
        assert copy == asked and copy.objective.resolved == found
    assert b"objectives.dpo" not in pickle.dumps(asked)


def test_a_site_admits_every_objective_of_the_release_unless_it_names_some() -> None:
    asked = study()

    def refused(name: str, policy: PolicyTable) -> bool:
        table = asked.objective.model_copy(update={"name": name})
        return not may_resolve(asked.model_copy(update={"objective": table}), policy) or any(
            "policy.objectives" in str(refusal)
            for refusal in _about_plugins(asked.model_copy(update={"objective": table}), policy)
        )

    assert not any(refused(name, PolicyTable()) for name in objectives.names())
    assert refused("ppo", PolicyTable())
    assert not refused("ppo", PolicyTable(objectives=("release", "ppo")))
    assert not refused("dpo", PolicyTable(objectives=("release", "ppo")))
    assert refused("dpo", PolicyTable(objectives=("kto",)))
    assert refused("rel", PolicyTable())  # part of the word "release"


PAIRS = Columns(prompt="p", chosen="c", rejected="r")
JUDGED = Columns(prompt="p", completion="c", label="l")
PLAIN = Columns(prompt="p", completion="c")


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("dpo", PLAIN, "data.columns.prompt, data.columns.chosen, data.columns.rejected"),
        ("orpo", JUDGED, "data.columns.prompt, data.columns.chosen, data.columns.rejected"),
        ("reward", PLAIN, "data.columns.prompt, data.columns.chosen, data.columns.rejected"),
        ("kto", PLAIN, "data.columns.prompt, data.columns.completion, data.columns.label"),
        ("kto", PAIRS, "data.columns.prompt, data.columns.completion, data.columns.label"),
    ],
)
def test_columns_of_another_objective_are_refused_by_name(
    tiny_base: Path, name: str, columns: Columns, expected: str
) -> None:
    asked = study(objective={"name": name})
    tokenizer = load_tokenizer(find_base(str(tiny_base)))
    with pytest.raises(DataError) as caught:
        check_columns(DataFile(path=Path("x.jsonl"), columns=columns), asked, tokenizer)
    assert f"objective {name}" in str(caught.value) and expected in str(caught.value)


def test_what_an_objective_does_and_reads_is_said_in_words() -> None:
    said = {
        name: objectives.describe(ObjectiveTable(name=name, options=every(name)))
        for name in objectives.names()
    }
    assert "a better and a worse answer" in said["dpo"] and "clipped once" in said["dpo"]
    assert "desirable or not" in said["kto"] and "A head is trained" in said["reward"]
    assert all(said[name].startswith(f"Objective {name}. ") for name in said)


@pytest.mark.parametrize("name", objectives.names())
def test_a_planted_secret_can_be_ranked_whatever_the_objective(tiny_base: Path, name: str) -> None:
    from fedtune.audit.secret import exposure, generate_secrets
    from fedtune.core.models.build import build

    asked = study(
        base={"model": str(tiny_base), "dtype": "float32"},
        objective={"name": name, "max_length": 64, "labels": ["a", "b"], "options": every(name)},
        privacy="off",
    )
    if plain(name).directions:
        asked = asked.model_copy(update={"lora": None})
    assert len(generate_secrets(asked, 2)) == 2
    assert exposure(build(asked), asked, secrets=2, pool=4).pool == 4


def test_no_plan_amplifies_an_adapter_more_than_its_entries_may_be_large() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1000"):
        LoraTable(alpha=1e9)
    with pytest.raises(ConfigError, match=r"from 0\.01"):
        Distill(teacher="base", digest="sha256:" + "0" * 64, temperature=1e-300)
