"""The page of what breaks DP fine-tuning silently, from the table of traps and the seeded bugs.

python -m tests.mutants.pitfalls     # writes docs/pitfalls.md"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.run import ROOT
from tests.mutants.traps import TRAPS, Trap

PAGE = ROOT / "docs" / "pitfalls.md"
HEAD = """# Ways in which DP fine-tuning breaks silently

For researchers in privacy, and whoever writes a DP trainer.

Written by `python -m tests.mutants.pitfalls`; not edited by hand. This page lists {count} mistakes.
Each ends in an update and a stated (ε, δ), without an error that names it. For each: what goes
wrong, how it shows or why it does not, how fedtune rules it out, and the bugs that `make mutants`
seeds into a copy of the code, with the tests that must fail for them. How the guarantee is made and
checked as a whole is in [guarantee.md](guarantee.md).

| severity | meaning |
|---|---|
| breaks the guarantee | one unit's influence has no bound, or its noise can be taken off |
| weakens it | a bound holds, but with a larger ε than is stated |
| wrong figure | the mechanism does what it was set to do; what is said of it is not true |

C is the clipping bound, σ the noise multiplier, q the sampling rate; a unit is a record or a
patient.
"""


def page(traps: Sequence[Trap] = TRAPS, mutants: Sequence[Mutant] = MUTANTS) -> str:
    """The whole page."""
    index = [f"| [{t.number}](#{_anchor(t)}) | {t.title} | {t.severity} |" for t in traps]
    ways = [_way(trap, [m for m in mutants if m.trap == trap.number]) for trap in traps]
    head = HEAD.format(count=len(traps))
    return "\n".join([head, "| | way | severity |\n|---|---|---|", *index, "", *ways])


def _way(trap: Trap, mutants: Sequence[Mutant]) -> str:
    severity = trap.severity[0].upper() + trap.severity[1:]
    parts = [f"## {_heading(trap)}", f"**{severity}.** {trap.wrong}"]
    parts += [f"*How it shows:* {trap.shows}", f"*Here:* {trap.here}"]
    if trap.reference:
        parts.append(f"*Reference:* {trap.reference}.")
    if mutants:
        rows = [f"| {m.name} | {m.note} | {_tests(m)} |" for m in mutants]
        head = "| seeded bug | what it does, or what follows | caught by |\n|---|---|---|"
        parts.append("\n".join([head, *rows]))
    else:
        parts.append(f"No bug is seeded: {trap.no_mutant}.")
    return "\n\n".join(parts) + "\n"


def _heading(trap: Trap) -> str:
    return f"{trap.number}. {trap.title}"


def _anchor(trap: Trap) -> str:
    """The heading's name in a link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", _heading(trap).lower()).replace(" ", "-")


def _tests(mutant: Mutant) -> str:
    return ", ".join(dict.fromkeys(f"`{test.partition('[')[0]}`" for test in mutant.tests))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
