"""Build a run that was derived from other runs: its name, its files, and the first fields of its
report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedtune
from fedtune import report
from fedtune.core.config import LoraTable, Study
from fedtune.core.run_folder import write_plan


def derived_name(out: Path, otherwise: str) -> str:
    """Make a study's name from the name of the folder `out`, with only characters that a study's
    name may have. otherwise: the name if no character is left."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("._-")[:64] or otherwise


def derived_study(first: Study, out: Path, otherwise: str, **changes: Any) -> Study:
    """Return the plan of a derived run, which `fedtune evaluate` and `generate` read: the first
    parent's plan with another name and some other tables. The seed stays, so that draws can be
    repeated.

    - first: the plan of the first parent run
    - out: the folder of the derived run, from which its name is made
    - otherwise: the name if the folder's name has no usable character
    - changes: the tables to replace, by name"""
    named = first.study.model_copy(update={"name": derived_name(out, otherwise)})
    return first.model_copy(update={"study": named, **changes})


def adapter_facts(table: LoraTable | None) -> dict[str, Any]:
    """Describe an adapter for a report: {"folder": "adapter"} and the fields of its LoRA table.
    table: the run's [lora]; None if the run has only a head."""
    shape = table.model_dump(mode="json", exclude_none=True) if table else {}
    return {"folder": "adapter"} | shape


def write(draft: Path, study: Study, sections: Mapping[str, Any]) -> None:
    """Write plan.json and the report of a derived run into its folder, which is not finished yet
    and holds the adapter already.

    - draft: the folder
    - study: the derived run's plan (`derived_study`)
    - sections: the report's entries: base, adapter, private, privacy, and others

    Errors: InfrastructureError."""
    head = {
        "fedtune": fedtune.__version__,
        "study": study.study.name,
        "plan_digest": study.digest,
        "rounds": [],
    }
    write_plan(draft, study)
    report.write(draft, head | dict(sections))
