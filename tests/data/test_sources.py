"""What reads a site's files: by suffix, or as its own site.toml says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Columns, SiteData, load_site, load_study
from fedtune.core.data.files import rows
from fedtune.core.data.records import read_records
from fedtune.core.data.sources import SOURCES, Names, Row, Source, by_suffix
from fedtune.core.errors import ConfigError, DataError
from tests.plugins import install

SECRET = "Zaphod-Beeblebrox-1979"
TEXT = Columns(text="t")
CODE = """
from dataclasses import dataclass
from fedtune.core.data.sources import Source

@dataclass(frozen=True)
class Odd(Source):
    suffixes = (".odd",)
    times: int = 1

    def rows(self, path, names):
        names.header(["t"])
        yield {"t": "x" * self.times}
"""


def dataset(path: Path, source: str | None, **options: Any) -> SiteData:
    return SiteData(path=path, columns=TEXT, source=source, options=options)


def test_each_suffix_has_one_source() -> None:
    named = [(suffix, name) for name in SOURCES.release() for suffix in SOURCES.load(name).suffixes]
    assert sorted(by_suffix()) == sorted(suffix for suffix, _ in named)
    assert {".arrow", ".csv", ".jsonl", ".parquet"} <= set(by_suffix())


def test_a_csv_file_may_have_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('t;u\n"a;b";1\nc;2\n')
    records, rejected = read_records(dataset(path, "csv", delimiter=";"))
    assert [record.completion for record in records] == ["a;b", "c"] and not rejected
    with pytest.raises(DataError, match="not well-formed CSV at line 2"):
        read_records(dataset(path, None))
    for wrong, said in (
        ({"delimiter": ";;"}, "one character"),
        ({"delimiter": 1.0}, "the type of its default, ','"),
        ({"delimeter": ";"}, "one of delimiter"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_records(dataset(path, "csv", **wrong))


def test_what_another_distribution_brings_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would see the rows of many units; a converter sees one unit's."""
    points = {"fedtune.sources": {"odd": "odd_source:Odd"}}
    install(tmp_path / "installed", monkeypatch, "odd_source", CODE, points)
    path = tmp_path / "data.odd"
    path.write_text("")
    with pytest.raises(DataError, match=r"unsupported suffix; expected \.arrow, \.csv"):
        read_records(dataset(path, None))
    with pytest.raises(ConfigError, match=r"one of arrow, csv, fhir, jsonl, parquet, sql$"):
        read_records(dataset(path, "odd", times=3.0), strict=False)
    assert "odd_source" not in sys.modules


def test_a_sources_own_words_about_a_row_are_not_kept(tmp_path: Path) -> None:
    """They may quote the row."""

    @dataclass(frozen=True)
    class Odd(Source):
        suffixes = (".odd",)

        def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
            names.header(["t"])
            yield {"t": "xxx"}
            yield f"the record of {SECRET} is broken"
            yield [SECRET]  # type: ignore[misc]

    (tmp_path / "data.odd").write_text("")
    found = list(rows(tmp_path / "data.odd", {}, source=Odd()))
    assert found == [{"t": "xxx"}, "cannot be read", "wrong type"]


def test_a_plan_names_no_source_and_options_need_one(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(
        '[site]\nname = "s"\ndeclared_size = 10\n[data]\npath = "d.csv"\n'
        'options = { delimiter = ";" }\n[data.columns]\ntext = "t"\n'
    )
    with pytest.raises(ConfigError, match="belong to a source"):
        load_site(site)
    study = tmp_path / "study.toml"
    study.write_text(
        'privacy = "off"\n[study]\nname = "s"\n[base]\nmodel = "m"\n[objective]\n'
        'name = "causal_lm"\n[lora]\n[training]\nrounds = 1\nsampling_rate = 1.0\n'
        'learning_rate = 1.0\n[public]\npath = "p.csv"\nlicence = "CC0"\nsource = "csv"\n'
        '[public.columns]\ntext = "t"\n'
    )
    with pytest.raises(ConfigError, match=r"public\.source: unknown key"):
        load_study(study)
