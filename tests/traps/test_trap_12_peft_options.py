"""Trap 12: adapters that have no per-record gradient, or whose start is read off private data."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedtune.core.config import LoraTable, Site
from fedtune.core.dp.plan import plan_for_site
from fedtune.core.errors import PolicyRefused
from fedtune.core.vault.policy import admit
from tests.dp.conftest import study


def site(tmp_path: Path, **columns: str) -> Site:
    """A site whose file of records does not exist: reading it would be another error."""
    body = {
        "site": {"name": "a", "declared_size": 100, "state": str(tmp_path / "state")},
        "data": {"path": str(tmp_path / "no-such.jsonl"), "columns": {"text": "t"} | columns},
        "policy": {"bases": ["sha256:" + "1" * 64]},
    }
    return Site.model_validate(body, strict=False)


def lora(**changes: object) -> dict[str, object]:
    pinned = {"rank": 4, "alpha": 8.0, "a_digest": "sha256:" + "0" * 64}
    return pinned | {"modules": ["q_proj"]} | changes


BASE = {"model": "tiny", "digest": "sha256:" + "1" * 64}


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head", "wte", "norm"])
def test_a_module_outside_the_allow_list_is_refused(tmp_path: Path, module: str) -> None:
    made = study(base=BASE, lora=lora(modules=["q_proj", module]))
    with pytest.raises(PolicyRefused, match=r"policy\.modules"):
        admit(made, site(tmp_path), plan_for_site(made, 100))
    good = study(base=BASE, lora=lora())
    admit(good, site(tmp_path), plan_for_site(good, 100))  # the twin


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        *({"a_init": start} for start in ("pissa", "eva", "corda", "lora_ga", "olora")),
    ],
    ids=str,
)
def test_an_option_outside_the_allow_list_is_unknown(option: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoraTable.model_validate(lora() | option, strict=False)


def test_records_are_not_enough_where_there_are_patients(tmp_path: Path) -> None:
    """Trap 23: a record-level guarantee would be read as a patient's."""
    made = study(base=BASE, lora=lora())
    with pytest.raises(PolicyRefused, match=r"privacy\.unit"):
        admit(made, site(tmp_path, patient="who"), plan_for_site(made, 100))
