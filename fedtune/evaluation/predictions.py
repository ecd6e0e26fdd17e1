"""Hold a run's predictions, one per record, and write them to files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.errors import ConfigError
from fedtune.core.files.writing import replace

Rows = list[dict[str, Any]]
Carried = str | int | float | None  # a cell of a record that is copied to its prediction
DIGITS = 6  # significant digits of written numbers; fp32 has hardly more
SHARE = "probability."  # the prefix of a column with a label's probability


@dataclass(frozen=True, repr=False, eq=False)
class Predictions:
    """The predictions of a run for n records, in the records' order.

    - labels: the K classes or choices; empty for a reward head
    - outputs: (n, K) fp64: the head's logits, or the choices' log-likelihoods in nats; for a reward
      head the scores, (n, 1). NaN for a record that cannot be used
    - reasons: (n,): why a record cannot be used; "" if it can
    - carried: column -> its n cells, of the columns that `predict` was asked to copy from the
      records (`ids`). Nothing else of the records is held"""

    labels: tuple[str, ...]
    outputs: np.ndarray
    reasons: tuple[str, ...]
    carried: Mapping[str, tuple[Carried, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reasons)

    def __repr__(self) -> str:
        of = f"of {len(self.labels)} labels" if self.labels else "scores"
        return f"Predictions({len(self)} records, {of}, {self.rejected.total()} rejected)"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the labels in the form for people: without white space at their ends, except if
        this would make two labels equal."""
        names = tuple(label.strip() for label in self.labels)
        return names if len({*names}) == len(names) else self.labels

    @property
    def rejected(self) -> Counter[str]:
        """Count the records that cannot be used: reason -> number of records."""
        return Counter(reason for reason in self.reasons if reason)

    @property
    def probabilities(self) -> np.ndarray:
        """Compute each label's probability, (n, K), by a softmax over the outputs; NaN for a record
        that cannot be used. For a reward head the shape is (n, 0)."""
        if not self.labels:
            return np.empty((len(self), 0))
        with np.errstate(invalid="ignore"):
            powers = np.exp(self.outputs - self.outputs.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
        return shares

    @property
    def predicted(self) -> list[str | None]:
        """Return each record's likeliest label (the first of equally likely ones); None for a
        record that cannot be used, and for a reward head."""
        if not self.labels:
            return [None] * len(self)
        return [
            None if reason else self.labels[int(row.argmax())]
            for row, reason in zip(self.outputs, self.reasons, strict=True)
        ]

    @property
    def scores(self) -> np.ndarray:
        """Return a reward head's score of each record, (n,); NaN for a record that cannot be used,
        and for any other run."""
        return np.full(len(self), np.nan) if self.labels else self.outputs[:, 0]

    def rows(self) -> Rows:
        """Return one flat dict for each record, with these keys:

        - "row": the record's number, from 1
        - the columns that are carried over from the records
        - "prediction", and "probability.LABEL" for each label; for a reward head "score" instead
        - "reason": why the record cannot be used

        A value is None if the record has none. Probabilities and scores are rounded to DIGITS
        significant digits."""
        told = dict(zip(self.labels, self.names, strict=True))
        values = zip(self.predicted, self.probabilities, self.scores, self.reasons, strict=True)
        rows: Rows = []
        for n, (label, shares, score, reason) in enumerate(values, 1):
            row: dict[str, Any] = {"row": n}
            row |= {name: cells[n - 1] for name, cells in self.carried.items()}
            if self.labels:
                row["prediction"] = None if label is None else told[label]
                parts = zip(self.names, shares, strict=True)
                row |= {f"{SHARE}{name}": _number(share) for name, share in parts}
            else:
                row["score"] = _number(score)
            rows.append(row | {"reason": reason or None})
        return rows

    def write(self, out: Path | str) -> Path:
        """Write `rows` to a .csv, .jsonl or .parquet file that only this user can read (0600), and
        return its path. An existing file is replaced. Errors: ConfigError if the file has another
        suffix; InfrastructureError if it cannot be written."""
        out = check_out(out)
        return replace(out, WRITERS[out.suffix.lower()](self.rows()), private=True)


def check_out(out: Path | str) -> Path:
    """Check that predictions can be written to a file with this name, and return its path. Errors:
    ConfigError if it is a folder, or its suffix is none of .csv, .jsonl and .parquet."""
    out = Path(out)
    if out.suffix.lower() not in WRITERS:
        raise ConfigError(f"{out}: unsupported suffix", ", ".join(WRITERS), "choose another --out")
    if out.is_dir():
        raise ConfigError(f"{out}: a folder", "a file", "choose another --out")
    return out


def check_ids(columns: Sequence[str]) -> None:
    """Check that the columns to be copied from the records can stand beside the predictions, i.e.
    that none has the name of a column of the predictions. Errors: ConfigError if one has."""
    for column in columns:
        if column in ("row", "prediction", "score", "reason") or column.startswith(SHARE):
            raise ConfigError(
                f"--id {column}: the predictions already have a column of this name",
                "another column of the records",
                "rename it in the file",
            )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.{DIGITS}g}")


def _csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    kinds = {"row": pyarrow.int64(), "prediction": pyarrow.string(), "reason": pyarrow.string()}
    for name in rows[0]:
        if name == "score" or name.startswith(SHARE):
            kinds[name] = pyarrow.float64()  # also if all values are None
        elif name not in kinds:
            kinds[name] = pyarrow.array([row[name] for row in rows]).type
    schema = pyarrow.schema([(name, kinds[name]) for name in rows[0]])
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), content)
    return content.getvalue()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
