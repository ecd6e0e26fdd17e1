"""Read Arrow files, and the folders that the package datasets (Hugging Face) saves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.data.sources._arrow import Classes, list_asked_columns, rows_of
from fedtune.core.data.sources._interface import Names, Row, Source
from fedtune.core.errors import DataError
from fedtune.core.files import reading

if TYPE_CHECKING:
    import pyarrow as pa

STATE, SPLITS = "state.json", "dataset_dict.json"  # as `Dataset.save_to_disk` names them
FILE = b"ARROW1"  # the beginning of an Arrow file; a stream, as of `save_to_disk`, lacks it


@dataclass(frozen=True)
class Arrow(Source):
    """Reads Arrow files, and folders that `Dataset.save_to_disk` of Hugging Face wrote. In such a
    folder it reads only the files that state.json lists, and no cache file beside them. If a cell
    holds the number of a class, the name that the data set gives this class is read. The package
    `datasets` is not used, so no code of a data set runs."""

    suffixes = (".arrow",)

    def files(self, folder: Path) -> list[Path] | None:
        if (folder / SPLITS).is_file():
            listed = _read_description(folder / SPLITS).get("splits")
            splits = [name for name in listed if _plain(name)] if isinstance(listed, list) else []
            raise DataError(
                f"{folder}: holds several data sets, one per folder",
                f"the folder of one of them: {', '.join(map(str, splits[:9])) or 'none is listed'}",
                "name it in data.path",
            )
        if not (folder / STATE).is_file():
            return None
        listed = _read_description(folder / STATE).get("_data_files")
        if listed is None:  # some other program's
            return None
        files = listed if isinstance(listed, list) else []
        names = [str(one.get("filename", "")) if isinstance(one, dict) else "" for one in files]
        if not names or not all(map(_plain, names)):
            raise DataError(
                f"{folder / STATE}: lists no data file, or one that is not in this folder",
                "the names of the data files that lie beside it",
            )
        return [folder / name for name in names]

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        import pyarrow as pa

        try:
            with reading.open_regular(path) as file:
                batches = _batches(file)
                schema = next(batches)
                columns = list_asked_columns(schema, names)
                classes = _classes(schema, columns)
                for batch in batches:
                    yield from rows_of(batch, columns, classes)
        except MemoryError:  # also of Arrow: not the file's fault
            raise
        except (pa.ArrowException, OSError) as error:
            kind = type(error).__name__
            raise DataError(
                f"{names.where}: not a readable Arrow file ({kind})",
                "an Arrow file or stream, as `Dataset.save_to_disk` writes it",
            ) from None


def _batches(data: BufferedReader) -> Iterator[pa.Schema | pa.RecordBatch]:
    """Yield first the schema of an open Arrow file, and then each of its record batches.

    Files are not mapped: a file that is truncated while it is read would end this process (SIGBUS).
    No thread is started: the number that Arrow would start depends on how long each column takes.
    """
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    if data.peek(len(FILE))[: len(FILE)] != FILE:
        with pa.ipc.open_stream(pa.PythonFile(data, mode="r"), options=options) as stream:
            yield stream.schema
            yield from stream
        return
    whole = pa.BufferReader(data.read())  # given a file, Arrow would read it by threads
    with pa.ipc.open_file(whole, options=options) as file:
        yield file.schema
        yield from (file.get_batch(number) for number in range(file.num_record_batches))


def _classes(schema: pa.Schema, columns: list[str]) -> Classes:
    """Return the names of the classes, as a dict: column -> names, for each of `columns` whose
    cells are a class's number. The package `datasets` keeps these names in the schema. Return {} if
    they cannot be read."""
    try:
        known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = known["info"]["features"]
        found = {
            name: tuple(map(str, features[name]["names"]))
            for name in columns
            if features.get(name, {}).get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found


def _read_description(path: Path) -> dict[str, Any]:
    return reading.json_in(path, "as `Dataset.save_to_disk` writes it", kind=DataError)


def _plain(name: object) -> bool:
    """Return whether `name` is a file's name alone, without a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
