"""Read Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.core.data.sources._arrow import list_asked_columns, rows_of
from fedtune.core.data.sources._interface import Names, Row, Source
from fedtune.core.errors import DataError
from fedtune.core.files import reading

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH = 1024  # rows that are decoded at once


@dataclass(frozen=True)
class Parquet(Source):
    """Reads Apache Parquet files. Only the columns that study.toml or site.toml names are read."""

    suffixes = (".parquet",)

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with reading.open_regular(path) as file, pq.ParquetFile(file) as source:
                columns = list_asked_columns(source.schema_arrow, names)
                for group in range(source.num_row_groups):
                    yield from _rows_of_group(source, group, columns)
        except MemoryError:  # also of Arrow: not the file's fault
            raise
        except (pa.ArrowException, OSError) as error:
            kind = type(error).__name__
            raise DataError(
                f"{names.where}: not a readable Parquet file ({kind})",
                "a whole Parquet file",
                "write the file again with the program that made it",
            ) from None


def _rows_of_group(source: ParquetFile, group: int, columns: list[str]) -> Iterator[Row | str]:
    """Yield the rows of one row group, each as a dict of the cells in `columns`, or as the reason
    (a str) why the row cannot be used. A batch of rows that cannot be decoded, as when it has more
    than 2 GiB of nested texts, is decoded again row by row. Errors: pyarrow.ArrowException if the
    file is damaged, or if a single row is that long; the rows after it are then not read."""
    import pyarrow as pa

    def batches(size: int) -> Iterator[pa.RecordBatch]:
        # How many threads Arrow would start follows from how long each column takes.
        yield from source.iter_batches(size, [group], columns, use_threads=False)

    done = 0
    try:
        for batch in batches(BATCH):
            yield from rows_of(batch, batch.schema.names)
            done += batch.num_rows
        return
    except pa.ArrowNotImplementedError:
        pass
    for number, batch in enumerate(batches(1)):
        if number >= done:
            yield from rows_of(batch, batch.schema.names)
