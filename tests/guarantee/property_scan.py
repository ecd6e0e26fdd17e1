"""A site whose records are scanned for identifiers, as cases of the neighbour property."""

from __future__ import annotations

from dataclasses import replace

from fedtune.core.data import scan_engine
from tests.guarantee.property_pins import CLASSES, HEAD, X, own, rounds, row
from tests.guarantee.property_plans import Plan
from tests.guarantee.property_world import Case

# Notes with identifiers, the unit's and others', and the same note of two patients.
NAMED = "Dr Adeyemi rang 617-555-0142 on 4 March 2021."
SCANNED = {
    f"scanned-to-{action}": Case(
        plans=(Plan(**HEAD, q=0.5, rounds=3),),
        files={
            "records": (
                row("a", NAMED),
                row("a", X, "n"),
                row("a", "MRN 4471902, fever", since=1),
                *own("bcdef"),
                row("b", NAMED, "n"),
                row("c", "Seen by Dr Adeyemi.", since=1),
            )
        },
        ops=(
            ("prepare", 0),
            *rounds(0, 1, 1),
            ("files", 1),
            ("restart",),
            ("prepare", 0),
            *rounds(0, 2, 3),
        ),
        unit="a",
        places=(replace(CLASSES, scan=action),),
    )
    for action in ("redact", "leave_out")
    if not scan_engine.name_missing_package()
}
