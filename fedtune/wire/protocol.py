"""Which language coordinator and site speak: one number, raised when one could misread the other.

It covers all that crosses the wire: plans, admissions, orders, updates, seals, receipts and
enrolment files. A release of fedtune that changes none of them keeps the number, and may replace
another at either end in the middle of a study.

| same number, another release | goes on                                                         |
| another number               | refused by whoever notices first, before a record is read or a  |
|                              | round is charged; the other end is told both numbers            |
| none                         | a peer from before there was one: refused                       |

To every version belong, for ever: the message `query.prepare` with a record `plan`, its answer with
a record `admission`, and in both the fields below; in the answer also `name`, `status`, `reason`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedtune import __version__
from fedtune.errors import Refused

PROTOCOL = 2
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}")


class OtherProtocol(Refused):
    """The peer speaks another version of the protocol."""


def spoken() -> dict[str, int | str]:
    """What this end says of itself. Guarantee: public, and the same for every site."""
    return {"protocol": PROTOCOL, "release": __version__}


def check_peer(who: str, said: Mapping[str, Any], here: str) -> None:
    """Errors: OtherProtocol where `who`, which said `said`, speaks another protocol than `here`."""
    theirs = said.get("protocol")
    if type(theirs) is int and theirs == PROTOCOL:
        return
    number = str(theirs) if type(theirs) is int and 0 <= theirs < 10**6 else "unknown"
    named = said.get("release")
    known = isinstance(named, str) and _RELEASE.fullmatch(named) is not None
    raise OtherProtocol(
        f"{who} speaks protocol {number} (fedtune {named if known else 'unknown'}), {here} "
        f"protocol {PROTOCOL} (fedtune {__version__})",
        "the same protocol at both ends",
        "install a release with that protocol here or there; what was spent stays spent, and the "
        "study goes on with --resume",
    )
