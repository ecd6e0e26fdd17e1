"""The reviewer's path is whole: each block has its parts, and the code that it names is there and
about as long as it says. (That its commands and files exist, test_docs.py says.)"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "review.md").read_text(encoding="utf-8")
PARTS = ("Read", "True", "Ask", "Attack", "Not covered")
OFF = 0.1  # of the lines that a block says: a change of a few does not make it stale


def wrong(page: str) -> Iterator[str]:
    """Say what is wrong with the blocks, before the last one, which is the reader's own."""
    planned = dict(re.findall(r"\| \[(\d): [^|]*\| ([\d,]+) \|", page))
    blocks = re.split(r"^### (\d): .*$", page, flags=re.MULTILINE)
    for number, block in list(zip(blocks[1::2], blocks[2::2], strict=True))[:-1]:
        yield from (f"{number}: no {part}" for part in PARTS if f"\n**{part}**" not in block)
        said = re.search(r"\*\*Read\*\* \(about ([\d,]+) lines\):(.*?)\n\n", block, re.DOTALL)
        if said is None:
            yield f"{number}: not how many lines"
            continue
        files = dict.fromkeys(re.findall(r"`(core/[\w/]+\.py)`", said[2]))
        true = sum(len(text(file).splitlines()) for file in files)
        if abs(_number(said[1]) - true) > OFF * true:
            yield f"{number}: {said[1]} lines, which are {true}"
        if planned.get(number) != said[1]:
            yield f"{number}: {planned.get(number)} lines in the plan"
    for file, function in re.findall(r"`(core/[\w/]+\.py)`: `(?:\w+\.)?(\w+)`", page):
        if f"def {function}(" not in text(file):
            yield f"{file}: no {function}"


def text(file: str) -> str:
    """Read a file of fedtune."""
    return (ROOT / "fedtune" / file).read_text(encoding="utf-8")


def _number(written: str) -> int:
    return int(written.replace(",", ""))


def test_every_block_has_its_parts_and_its_lines() -> None:
    assert list(wrong(PAGE)) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("(about 2,530 lines)", "(about 900 lines)", "3: 900 lines, which are"),
        ("`core/dp/clip.py`, ", "", "5: 910 lines, which are"),
        ("| 1,050 |", "| 190 |", "7: 190 lines in the plan"),
        ("`SitePlan.step`", "`SitePlan.stride`", "core/dp/plan.py: no stride"),
        ("\n**Not covered**: how long", "\nhow long", "5: no Not covered"),
    ],
)
def test_twin_a_path_that_is_not_whole_is_found(old: str, new: str, found: str) -> None:
    assert old in PAGE
    assert any(each.startswith(found) for each in wrong(PAGE.replace(old, new)))


def test_it_leads_through_as_much_as_it_says() -> None:
    """In the first paragraph and in the table."""
    said = re.search(r"You read about ([\d,]+) of", PAGE)
    assert said
    planned = sum(_number(lines) for lines in re.findall(r"\| \[\d: [^|]*\| ([\d,]+) \|", PAGE))
    assert abs(planned - _number(said[1])) < 500
