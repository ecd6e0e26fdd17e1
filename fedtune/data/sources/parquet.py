"""Parquet data source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.sources._arrow import asked, rows_of
from fedtune.data.sources._interface import Names, Row, Source
from fedtune.errors import DataError
from fedtune.files import reading


@dataclass(frozen=True)
class Parquet(Source):
    """Apache Parquet; only the named columns are read."""

    suffixes = (".parquet",)

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with reading.opened(path) as file, pq.ParquetFile(file) as source:
                columns = asked(source.schema_arrow.names, names)
                for batch in source.iter_batches(batch_size=1024, columns=columns):
                    yield from rows_of(batch, batch.schema.names)
        except MemoryError:  # also of Arrow: not the file's fault
            raise
        except (pa.ArrowException, OSError) as error:
            kind = type(error).__name__
            raise DataError(
                f"{names.where}: not a readable Parquet file ({kind})",
                "a whole Parquet file",
                "write it again",
            ) from None
