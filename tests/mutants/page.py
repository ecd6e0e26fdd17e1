"""docs/mutants.md: every seeded bug, and whether a test caught it when it was last tried."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.mutants.mutant import Mutant

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mutants.md"
UNTRIED = "not tried"
HEAD = """\
# Seeded bugs

For whoever changes fedtune, or audits its tests.

Written by `make mutants` and `python -m tests.mutants.run`; not edited by hand. Each bug is put
into a copy of the shipped code, alone, and named tests must fail for it by an assertion. The
untouched code passes the same tests.

**{caught} of {all} caught**. {whole}

A number in the column *way* is one of the {traps} ways in which DP breaks silently, described in
[pitfalls.md](pitfalls.md). A word names another part of the code or another property.

| bug | way | file | what it does, or what follows | |
|---|---|---|---|---|
"""
WHOLE = re.compile(r"last tried (on .* of processor time)\.")


def whole(date: str, minutes: float) -> str:
    """Say when the whole catalogue was tried."""
    return f"on {date}, in {minutes:.0f} minutes of processor time"


def _tried(untried: int, when: str) -> str:
    """Say how many bugs have not been tried, and when the others were. when: as `whole`; "" if the
    whole catalogue never was."""
    if not when:
        return "The whole catalogue has not been tried yet."
    if not untried:
        return f"All of them were last tried {when}."
    have = "bug has" if untried == 1 else "bugs have"
    return (
        f"{untried} {have} not been tried yet. The whole catalogue, as it was then, was last tried "
        f"{when}."
    )


def recorded(text: str) -> dict[str, str]:
    """Read a page's bugs and how each ended.

    >>> recorded("| nan-passes | 4 | `a.py` | min(1, C/nan) is 1 | killed |")
    {'nan-passes': 'killed'}
    """
    rows = (line.split(" | ") for line in text.splitlines() if line.startswith("| "))
    return {
        row[0].removeprefix("| "): row[-1].removesuffix(" |")
        for row in rows
        if len(row) > 4 and row[1] != "way"
    }


def page(mutants: Sequence[Mutant], tried: Mapping[str, str], old: str = "", said: str = "") -> str:
    """Write the page: how each bug ended, as it was `tried` now or stands in the old page.

    said: when the whole catalogue was tried, as `whole`; without it, what the old page says."""
    known = recorded(old) | dict(tried)
    ended = {mutant.name: known.get(mutant.name, UNTRIED) for mutant in mutants}
    before = WHOLE.search(old)
    head = HEAD.format(
        caught=sum(status == "killed" for status in ended.values()),
        all=len(mutants),
        traps=len({mutant.trap for mutant in mutants if isinstance(mutant.trap, int)}),
        whole=_tried([*ended.values()].count(UNTRIED), said or (before[1] if before else "")),
    )
    rows = [
        f"| {m.name} | {m.trap} | `{m.file}` | {m.note} | {ended[m.name]} |\n"
        for m in sorted(mutants, key=lambda m: (str(m.trap).rjust(2), m.name))
    ]
    return head + "".join(rows)
