"""Ready-made studies, whose settings were measured, of one's own records: `fedtune init --task`.

One file per task. A preset's public file is divided once: its selection records choose how far each
round moves the adapter, its evaluation records only judge the result."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.data.files import rows
from fedtune.errors import ConfigError, DataError, InfrastructureError
from fedtune.files.writing import replace
from fedtune.presets import classify

TASKS = {"classify": classify}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SELECTION = 1 / 3  # of the public records; the others judge
LEAST = 40  # public records: with fewer, none are spared for selection


@dataclass(frozen=True)
class Records:
    """One's own files and their columns, of which a preset makes a study.

    data: each site's file; evaluation, public: public files, the first with answers; prompt,
    target: the columns of what is read and of what is to be said of it; patient: that of the
    patient, else the record is the unit; labels: the classes, else those of `evaluation`; size:
    units at a site, as a person states it in public; role: whose files are written."""

    prompt: str = "text"
    target: str = "label"
    patient: str | None = None
    data: tuple[Path, ...] = ()
    evaluation: Path | None = None
    public: Path | None = None
    labels: tuple[str, ...] = ()
    size: int = 200
    epsilon: float = 6.0
    role: Literal["both", "coordinator", "site"] = "both"

    @property
    def delta(self) -> float:
        """The power of ten that is at most a fifth of 1 / size, so that no unit can be let out."""
        return 10.0 ** -len(str(5 * self.size - 1))

    @property
    def sites(self) -> int:
        return max(1, len(self.data))


def write(folder: Path | str, task: str, records: Records) -> list[Path]:
    """Write a study of `task` to a new folder: study.toml, site files, and the public records that
    `records.evaluation` was divided into; of one role's, its own alone. Returns the paths.

    >>> from fedtune.presets import Records, write
    >>> [path.name for path in write("triage", "classify", Records(labels=("A", "B")))]
    ['study.toml', 'site.toml']

    Errors: ConfigError (no such task, labels missing, the folder holds a study), DataError (a file
    or a column that is not there), InfrastructureError. Nothing is written then."""
    folder = Path(folder)
    if task not in TASKS:
        raise ConfigError(f"no preset is called {task}", f"one of {', '.join(TASKS)}")
    for name in ("study.toml", "site.toml", "sites"):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists", "a new folder", "choose another")
    for path in records.data:
        if not path.exists():
            raise DataError(f"{path}: no such file", "each site's file of records")
    texts = {}
    if records.role != "site":
        public = _divided(records, folder.name)
        texts["study.toml"] = TASKS[task].study(folder.name, records, public)
        for name, part in public.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            texts[f"{name}.jsonl"] = "".join(lines)
    if records.role != "coordinator":
        texts |= _site_files(records, TASKS[task].SITE)
    paths = [folder / name for name in texts]
    try:
        for path, text in zip(paths, texts.values(), strict=True):
            replace(path, text.encode(), private=path.name == "site.toml")
    except InfrastructureError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def _divided(records: Records, seed: str) -> dict[str, list[dict[str, Any]]]:
    """Divide the public records with answers; {} where there are none."""
    if records.evaluation is None:
        return {}
    keys = {"--text": records.prompt, "--target": records.target}
    both = (records.prompt, records.target)
    usable = [
        {name: row[name] for name in both}
        for row in rows(records.evaluation, keys)
        if isinstance(row, dict) and all(str(row.get(name) or "").strip() for name in both)
    ]
    unique = list({json.dumps(row, sort_keys=True): row for row in usable}.values())
    if not unique:
        raise DataError(f"{records.evaluation}: no usable record", "public records with answers")
    random.Random(seed).shuffle(unique)
    count = round(SELECTION * len(unique)) if len(unique) >= LEAST else 0
    parts = {"selection": unique[:count], "evaluation": unique[count:]}
    return {name: part for name, part in parts.items() if part}


def _site_files(records: Records, text: str) -> dict[str, str]:
    """Fill in a site file for each of the sites' files, by the name that it lies under."""
    if not records.data:
        return {"site.toml": text.format(name="my-hospital", path="data.jsonl", **_of(records))}
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") for path in records.data]
    if len({*names}) < len(names) or not all(NAME.fullmatch(name) for name in names):
        names = [f"site-{n}" for n in range(1, len(names) + 1)]
    return {
        f"sites/{name}/site.toml": text.format(
            name=name, path=quoted(path.absolute()), **_of(records)
        )
        for name, path in zip(names, records.data, strict=True)
    }


def _of(records: Records) -> dict[str, Any]:
    patient = records.patient
    column = f"\npatient = {quoted(patient)}" if patient else '\n# patient = "patient_id"'
    return {
        "size": records.size,
        "delta": f"{records.delta:g}",
        "prompt": quoted(records.prompt),
        "target": quoted(records.target),
        "patient": column,
    }


def quoted(text: object) -> str:
    """Quote a TOML string."""
    return json.dumps(str(text), ensure_ascii=False)


def listed(texts: Sequence[str]) -> str:
    """Format a TOML list of strings, one on each line."""
    return "[\n" + "".join(f"    {quoted(text)},\n" for text in texts) + "]"
