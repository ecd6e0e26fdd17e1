"""What a person can set, type or be told stands in the docs, with the default that holds."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import fedtune
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.metrics import METRICS
from fedtune.observe.metrics import Metrics
from tests.docs import man, reference
from tests.observe.test_metrics import SITE

CONFIGURATION = (reference.ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+) \|$")
OPTION = re.compile(r"^\| (\w+ `\w+`) \| `(\w+)` \| (.+?) \| (.+) \|$")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with a ledger, whose figures are exported once there is one."""
    (tmp_path / "site.toml").write_text(SITE)
    Ledger(tmp_path / "state").declare("records", [], "sha256:0", [b"ann"])
    return tmp_path / "site.toml"


def described(page: str) -> dict[reference.Key, str]:
    """(heading, key) -> default, of every row that has a meaning."""
    heading, found = "", {}
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif option := OPTION.match(line):
            found[option[1], option[2]] = option[3]
        elif row := ROW.match(line):
            found[heading, row[1]] = row[2]
    return found


def test_every_key_and_option_is_documented_with_its_default() -> None:
    rows = described(CONFIGURATION)
    measures = {key: value for key, value in rows.items() if key[0] == "Metrics"}
    assert {k: v for k, v in rows.items() if k not in measures} == (
        reference.keys() | reference.options()
    )
    better = {name: "higher" if m.higher_is_better else "lower" for name, m in METRICS.items()}
    assert {name: value for (_, name), value in measures.items()} == better


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("| `rank` | `8` |", "| `rank` | `9` |"),
        ("| `seed` | `0` |", "| `sed` | `0` |"),
        ("| objective `dpo` | `beta` | `0.1` |", "| objective `dpo` | `beta` | `0.2` |"),
    ],
)
def test_twin_a_wrong_default_or_a_missing_key_is_found(line: str, instead: str) -> None:
    assert CONFIGURATION.count(line) == 1
    wrong = described(CONFIGURATION.replace(line, instead))
    measures = {key for key in wrong if key[0] == "Metrics"}
    assert {k: v for k, v in wrong.items() if k not in measures} != (
        reference.keys() | reference.options()
    )


def test_the_page_is_what_the_code_says() -> None:
    written = reference.PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "run python -m tests.docs.reference"


def test_the_manual_page_is_what_the_code_says_and_names_every_command() -> None:
    written = man.PAGE.read_text(encoding="utf-8")
    assert written == man.page(), "run python -m tests.docs.reference"
    plain = written.replace("\\-", "-")
    for name, command in reference.commands():
        assert f".SS {name}" in plain
        for parameter in reference.parameters(command):
            assert isinstance(parameter, click.Argument) or parameter.opts[0] in plain
    assert man.escaped(".start") != ".start"  # a line of text is no request of roff's


def test_every_command_flag_and_error_says_what_it_is() -> None:
    for name, command in reference.commands():
        assert command.help, name
        for parameter in reference.parameters(command):
            assert isinstance(parameter, click.Argument) or parameter.help, (name, parameter.name)  # type: ignore[attr-defined]
    for error in reference.errors():
        assert error.__doc__ and error.__doc__ != (error.__base__ or error).__doc__, error


def test_every_metric_of_a_machine_is_documented(site: Path) -> None:
    page = (reference.ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"fedtune_\w+", page))
    for found in (Metrics("coordinator"), Metrics("site", site=site)):
        # A counter's family is named without the _total that is scraped.
        families = {
            family.name + "_total" * (family.type == "counter")
            for family in found.registry.collect()
        }
        assert families and families <= documented, families - documented


def test_every_exported_name_says_what_it_is() -> None:
    for name in fedtune.__all__:
        assert reference.summary(getattr(fedtune, name)), name
