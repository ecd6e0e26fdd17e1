"""A run folder: where it lies, and what is read back from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, InputError, ModelError

if TYPE_CHECKING:
    from fedtune.config import DataFile, Study
    from fedtune.models.lora import Arrays

ADAPTER = "adapter_model.safetensors"  # PEFT's own name
BASE = "base"  # a run's own base, inside it


def folder_for(name: str, *, resume: bool) -> Path:
    """runs/NAME, or the first free runs/NAME-2, -3, …; with `resume` the last one there."""
    last = fresh = Path("runs") / name
    number = 1
    while fresh.exists():
        number += 1
        last, fresh = fresh, Path("runs") / f"{name}-{number}"
    return last if resume else fresh


def finished(study: Study) -> Path | None:
    """The newest finished run of this very study under runs/, whatever its plan had filled in
    when it started; None for a study without a last round."""
    from fedtune.dp.budget import with_rounds

    if study.continuous:
        return None
    name = study.study.name
    own = re.compile(re.escape(name) + r"(-\d+)?")
    found = [run for run in Path("runs").glob("*") if own.fullmatch(run.name)]
    for run in sorted(found, key=lambda run: (len(run.name), run.name), reverse=True):
        if not (run / "report.json").is_file():
            continue
        plan = load_plan(run)
        base = study.base.model_copy(update={"digest": study.base.digest or plan.base.digest})
        same = study.model_copy(update={"base": base})
        if study.lora and plan.lora:
            pinned = {"a_digest": study.lora.a_digest or plan.lora.a_digest}
            same = same.model_copy(update={"lora": study.lora.model_copy(update=pinned)})
        if with_rounds(same).digest == plan.digest:
            return run
    return None


def new_run(study: Study, out: Path | None, *, resume: bool) -> Path:
    """The folder of a run that starts or goes on. Errors: ConfigError where no folder was named and
    this very study is finished: asked for again, it would only be refused, or paid for twice."""
    if out is None and not resume and (run := finished(study)):
        raise ConfigError(
            f"this study is finished; {run} is there",
            todo=f"read {run}/report.md. Another study: change study.toml (study.name names its "
            "folder); it is paid from what `fedtune ledger SITE` shows as left. The same again, "
            "paid again where it must be trained again: --out DIR",
        )
    return out or folder_for(study.study.name, resume=resume)


def load_plan(run: Path) -> Study:
    """The study of a run. Errors: InputError, ConfigError."""
    from fedtune.config import study_from_json

    try:
        study = study_from_json((run / "plan.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{run}: not a run folder", "plan.json in it", "name the folder that a run printed"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{run / 'plan.json'}: {error.happened}") from None
    if study.base.model == BASE and (run / BASE).is_dir():
        own = study.base.model_copy(update={"model": str(run / BASE)})
        return study.model_copy(update={"base": own})
    return study


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft of the new folder `out`, which is there whole when this ends well, else not at all.

    Errors: ConfigError (it exists), InfrastructureError (disk)."""
    from fedtune.files import drafted

    if out.exists():
        raise ConfigError(f"{out}: exists", "a new folder", "choose another --out")
    with drafted(out) as draft:
        draft.mkdir()
        yield draft


def read_report(run: Path) -> dict[str, Any]:
    """The body of a finished run's report. Errors: InputError."""
    try:
        body = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        body = None
    if not isinstance(body, dict):
        raise InputError(
            f"{run}: has no readable report.json", "a finished run", "finish it with --resume"
        )
    return body


def data_file(run: Path, data: Path, pairs: list[str]) -> DataFile:
    """`data` with its columns named by KEY=NAME pairs, or as the run's study names its own.

    Errors: ConfigError, InputError."""
    from fedtune.config import DataFile

    table = load_plan(run).evaluation
    if pairs:
        return named_columns(data, pairs)
    if table is None:
        raise ConfigError("the study names no columns", todo="--column prompt=NAME, and so on")
    return DataFile(path=data, columns=table.columns)


def named_columns(data: Path, pairs: list[str]) -> DataFile:
    """`data` with its columns named by KEY=NAME pairs; without any, prompt alone.

    Errors: ConfigError."""
    from pydantic import ValidationError

    from fedtune.config import Columns, DataFile

    named = dict(pair.partition("=")[::2] for pair in pairs or ["prompt=prompt"])
    if unknown := set(named) - set(Columns.model_fields):
        known = ", ".join(Columns.model_fields)
        raise ConfigError(f"--column {min(unknown)}: no such part of a record", f"one of {known}")
    try:
        return DataFile(path=data, columns=Columns(**named))
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--column: {said}") from None


def load_adapter(folder: Path) -> Arrays:
    """All arrays saved in `folder` (PEFT's format, head.safetensors or both), by the network's
    names: the trained ones and the frozen factor. Errors: ModelError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from fedtune.models.network import HEAD

    found: Arrays = {}
    try:
        if (folder / ADAPTER).is_file():
            for name, value in load_file(folder / ADAPTER).items():
                found[name.removesuffix(".weight") + ".default.weight"] = value
        if (folder / HEAD).is_file():
            found |= {f"head.{name}": value for name, value in load_file(folder / HEAD).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be read ({type(error).__name__})") from None
    if not found:
        raise ModelError(f"{folder}: holds no adapter", f"{ADAPTER} or {HEAD}")
    return found
