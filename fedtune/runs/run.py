"""Read run folders: a run's report, adapter and metrics."""

from __future__ import annotations

import io
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.files import reading
from fedtune.core.files.reading import regular
from fedtune.core.files.writing import replace
from fedtune.core.models.adapter_files import ADAPTER as WEIGHTS
from fedtune.core.models.adapter_files import AGAIN, load_adapter
from fedtune.core.models.lora import Arrays
from fedtune.core.run_folder import ADAPTER, PRINTED, load_plan
from fedtune.evidence.personal import refuse_personal
from fedtune.evidence.sign import RUN
from fedtune.report.gain import is_start_released, over_start
from fedtune.report.preference import alarms
from fedtune.report.run_files import read_report
from fedtune.report.start_file import read_start


class Run:
    """A run, read from its folder: its study, its report, its adapter, its metrics by round.

    The run may still be going on. Its folder then has metrics, but no report.

    >>> import fedtune
    >>> fedtune.Run("runs/none")
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: InputError or ConfigError if the folder holds no run; NeverLeaves if it holds a site's
    personal model."""

    def __init__(self, folder: Path | str) -> None:
        refuse_personal(folder)
        self.folder = Path(folder)
        self.study: Study = load_plan(self.folder)

    @property
    def place(self) -> Path:
        """The path of the run's folder, by which messages to people name the run."""
        return self.folder

    @property
    def mark(self) -> str:
        """A text that is put before everything that this model writes, to warn readers: "" here,
        and "[personal model of SITE, …]" for a site's personal model (PersonalRun)."""
        return ""

    @cached_property
    def report(self) -> dict[str, Any]:
        """Read report.json, the report of a finished run. Errors: InputError if the run is not
        finished, or the report is damaged."""
        return read_report(self.folder)

    @property
    def private(self) -> bool:
        """Return whether the run, and all runs from which it was derived, satisfy (ε,
        δ)-differential privacy. Errors: InputError."""
        return bool(self.report.get("private"))

    @property
    def epsilon(self) -> dict[str, float]:
        """Return site -> ε of this run, at the study's δ; {} without privacy.

        Errors: InputError."""
        sites = self.report["privacy"].get("sites") or {}
        return {name: site["epsilon"] for name, site in sites.items()}

    def adapter(self) -> Arrays:
        """Read the adapter, its frozen factor, and the head if there is one: name -> array, fp32.
        Errors: ModelError."""
        return load_adapter(self.folder / ADAPTER)

    def load_peft(self, backbone: Any) -> Any:
        """Load the adapter onto a base by PEFT, as users without fedtune do, and return PEFT's
        model, ready for evaluation. backbone: the base as a transformers model. Errors: ModelError
        if PEFT cannot load the adapter."""
        from peft import PeftModel

        adapter = self.folder / ADAPTER
        for name in ("adapter_config.json", WEIGHTS):
            regular(adapter / name, "an adapter as PEFT saves it", AGAIN, ModelError)
        try:
            loaded = PeftModel.from_pretrained(backbone, str(adapter))
        except Exception as error:  # PEFT may raise anything on a file with values of other types
            raise ModelError(
                f"{adapter}: PEFT cannot load it ({type(error).__name__})", todo=AGAIN
            ) from None
        return loaded.eval()

    def start(self) -> Arrays | None:
        """Read the arrays of the public start, from which the rounds began: from the coordinator's
        checkpoint, or from the file that a dossier has. None if the study has no [start], or this
        folder has no such file with the digest that the plan names."""
        return read_start(self.folder, self.study)

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """Return the rounds as columns of equal length, from which a DataFrame can be built:
        "round", "seconds", "quality.loss", "epsilon.north", …; None if a round does not have the
        figure.

        Errors: InputError."""
        path = self.folder / "metrics.jsonl"
        rows = [*map(_flatten, reading.json_lines_in(path, "the metrics of a run", PRINTED))]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def write_metrics(self, out: Path | str) -> Path:
        """Write `metrics` to a .csv or .parquet file with one row for each round, and return its
        path. An existing file is replaced. out: the file; its suffix decides the format.

        Errors: ConfigError (another suffix), InputError, InfrastructureError."""
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        writers = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}
        out = Path(out)
        if out.suffix.lower() not in writers:
            raise ConfigError(f"{out}: unsupported suffix", ", ".join(writers), "choose another")
        columns = {
            name: [" ".join(map(str, v)) if isinstance(v, list) else v for v in values]
            for name, values in self.metrics.items()
        }
        content = io.BytesIO()
        writers[out.suffix.lower()](pyarrow.table(columns), content)
        return replace(out, content.getvalue())

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        return f"<code>{escape(repr(self))}</code> {escape(self._line())}"

    def _line(self) -> str:
        """Return a line about the run: the name of its study, and the result or "not finished"."""
        name = self.study.study.name
        if not (self.folder / "report.json").is_file():
            return f"{name}: not finished"
        quality = self.report.get("quality") or {}
        metric, before, after = (quality.get(key) for key in ("metric", "before", "after"))
        if not isinstance(before, dict) or not isinstance(after, dict) or metric not in after:
            return f"{name}: finished"
        warned = "; NOT shown to be better: see its report" if alarms(quality) else ""
        claim = over_start(quality)
        added = f"; {claim} what public text alone gives" if claim else ""
        added += ", which is released" if is_start_released(quality) else ""
        return f"{name}: {metric} {before.get(metric):.3g} → {after[metric]:.3g}{added}{warned}"


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Flatten a round's entry in metrics.jsonl, whose values may be dicts, to one level:
    {"epsilon": {"north": …}} becomes {"epsilon.north": …}."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}" if key else name: figure for key, figure in inner.items()}
    return flat


def open_run(folder: Path | str) -> Run:
    """Open the run in a folder, which is the run's own folder or that of a dossier. Errors:
    InputError or ConfigError if there is no run; NeverLeaves for a personal model."""
    inside = Path(folder) / RUN
    return Run(inside if (inside / "plan.json").is_file() else folder)
