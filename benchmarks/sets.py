"""The data sets of benchmarks.tables: where each lies, its arms and the settings tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from examples.fsdd import base as fsdd_base
from examples.fsdd import prepare as fsdd
from examples.medquad import prepare as medquad
from examples.mts_dialog import prepare as mts_dialog
from examples.preference import prepare as preference
from examples.vqa_rad import base as vqa_base
from examples.vqa_rad import prepare as vqa_rad
from examples.write import Table, merged

ROWS = {
    "base": "base, not trained",
    "local": "a site alone (mean over sites), ε = 8",
    "epsilon-1": "federated, ε = 1",
    "epsilon-3": "federated, ε = 3",
    "epsilon-8": "federated, ε = 8",
    "non-private": "federated, σ = 0 (same clipping)",
}


@dataclass(frozen=True)
class DataSet:
    """rows: arm -> its title in the table; tuning: arm -> changes to its tables, to be compared."""

    name: str
    title: str
    unit: str
    delta: float
    metric: str
    study: Callable[[str, int], Table]
    prepare: Callable[[Path, Path, int], list[Path]]
    tuning: dict[str, list[Table]]
    rows: dict[str, str]
    data: Path = Path()
    make: Callable[[Path], Path] | None = None  # writes the base, where no wheel is one by itself

    def at(self, data: Path, out: Path) -> DataSet:
        """With its records in `data`, and its base made in `out` unless it is there."""
        if self.make is None:
            return replace(self, data=data)
        base = (out / "base").resolve()
        if not (base / "README.md").exists():
            self.make(base)

        def study(arm: str, seed: int) -> Table:
            return merged(self.study(arm, seed), {"base": {"model": str(base)}})

        return replace(self, data=data, study=study)

    def write(self, out: Path, seed: int) -> list[Path]:
        """The example's files; the site files that were written."""
        return self.prepare(self.data, out, seed)

    @property
    def rows_in_order(self) -> list[str]:
        """Arms that see the data alike are neighbours, so that they share cached states."""
        order = ["base", "non-private", "epsilon-8", "epsilon-3", "epsilon-1", "local"]
        return [*order, *(name for name in self.rows if name not in order)]


SHARED_ROWS = {
    f"shared-{colluding}-{epsilon:g}": f"one dose of noise, t = {colluding}, ε = {epsilon:g}"
    for colluding in (1, 2)
    for epsilon in (0.5, 1.0, 2.0, 3.0, 8.0)
}
QUAD_ROWS = {
    **{name: ROWS[name] for name in ("base", "local")},
    **{f"epsilon-{e:g}": f"federated, ε = {e:g}" for e in medquad.RATES},
    "non-private": ROWS["non-private"],
    **SHARED_ROWS,
    "best-lora": "federated, best LoRA not private",
    **{
        f"{name}-{e}": f"ε = {e}, {title}"
        for e in (1, 3)
        for name, title in {
            "no-start": "no public start",
            "no-preconditioner": "no preconditioner",
            "one-record": "one record a document",
            "rank-4": "rank 4",
            "three-rounds": "three rounds",
        }.items()
    },
}
QUAD = DataSet(
    "medquad",
    "MedQuAD",
    "document",
    1e-3,
    medquad.METRIC,
    medquad.study,
    lambda data, out, seed: medquad.write(
        data / "medquad" / "train.jsonl", data / "pubmedqa" / "train.jsonl", out, seed
    ),
    medquad.TUNING,
    QUAD_ROWS,
)
QUAD_128 = replace(
    QUAD,
    name="medquad-128",
    title="MedQuAD, 128 tokens",
    study=lambda arm, seed: merged(medquad.study(arm, seed), {"objective": {"max_length": 128}}),
    rows={name: ROWS[name] for name in ROWS if name != "local"},
)
MTS = DataSet(
    "mts_dialog",
    "MTS-Dialog",
    "record",
    1e-3,
    mts_dialog.METRIC,
    mts_dialog.study,
    lambda data, out, seed: mts_dialog.write(data / "mts_dialog" / "train.jsonl", out, seed),
    mts_dialog.TUNING,
    {
        **ROWS,
        **{f"epsilon-{e:g}": f"federated, ε = {e:g}" for e in (0.5, 2)},
        **{f"no-start-{e}": f"ε = {e}, the head starts at zero" for e in (1, 3)},
        **SHARED_ROWS,
        "best-head": "federated, best head not private",
    },
)


def _preference(name: str, objective: str) -> DataSet:
    source = preference.SOURCES[name]
    rates = {"dpo": (3.0, 10.0, 30.0), "orpo": (0.3, 1.0, 3.0), "reward": (0.3, 3.0, 30.0)}
    alone = ("local",) if objective == "dpo" and name == "formulary" else ()
    rows = ("base", *alone, "epsilon-8", "non-private")
    return DataSet(
        f"{preference.KINDS[objective]}{name}",
        f"{source.title}, {objective}",
        source.unit,
        source.delta,
        preference.METRIC,
        partial(preference.study, name, objective),
        partial(preference.write, name),
        {
            arm: [{"training": {"learning_rate": rate}} for rate in rates[objective]]
            for arm in ("epsilon-8", "non-private")
        },
        {row: ROWS[row] for row in rows},
    )


PREFERENCE = [
    _preference(name, objective)
    for name, source in preference.SOURCES.items()
    for objective in source.tuned
]
MEDIA_ROWS = {name: ROWS[name] for name in ("base", "local", "epsilon-8", "non-private")}
VQA = DataSet(
    "vqa_rad",
    "VQA-RAD, closed questions",
    "patient",
    1e-3,
    vqa_rad.METRIC,
    vqa_rad.study,
    lambda data, out, seed: vqa_rad.write(
        data / "vqa_rad", data / "pubmedqa" / "train.jsonl", out, seed
    ),
    vqa_rad.TUNING,
    MEDIA_ROWS,
    make=vqa_base.write,
)
FSDD = DataSet(
    "fsdd",
    "FSDD, ten digits",
    "recording",
    1e-3,
    fsdd.METRIC,
    fsdd.study,
    lambda data, out, seed: fsdd.write(data / "fsdd_speech", out, seed),
    fsdd.TUNING,
    MEDIA_ROWS,
    make=fsdd_base.write,
)
