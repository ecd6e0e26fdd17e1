"""Parquet data source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.data.sources._interface import Names, Row, Source
from fedtune.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Parquet(Source):
    """Apache Parquet; only the named columns are read."""

    suffixes = (".parquet",)

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as source:
                present = source.schema_arrow.names
                names.header(present)
                columns = sorted(set(names.keys.values()) & set(present))
                for batch in source.iter_batches(batch_size=1024, columns=columns):
                    yield from (_row(batch, index) for index in range(batch.num_rows))
        except (pa.ArrowException, OSError) as error:
            kind = type(error).__name__
            raise DataError(f"{names.where}: not a readable Parquet file ({kind})") from None


def _row(batch: pa.RecordBatch, index: int) -> Row | str:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return "not UTF-8"
    except Exception:  # a value that Python has no type for: a date in the year 300,000
        return "wrong type"
