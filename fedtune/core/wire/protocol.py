"""Define the protocol version of coordinator and site. The number rises with each change after
which one of the two could misread the other.

The version covers all that crosses the wire: plans, admissions, orders, updates, seals, receipts
and enrolment files. A release of fedtune that changes none of them keeps the number, and may
replace another at either end in the middle of a study.

| the other end states         | what happens                                                    |
| same number, another release | the study goes on                                               |
| another number               | refused by the end that notices first, before a record is read  |
|                              | or a round is charged; the other end is told both numbers       |
| no number                    | refused: the peer's release is older than this numbering        |

So that two versions can always state their numbers to each other, the following stays the same in
every version: the message `query.prepare` has a record `plan`; its answer has a record `admission`;
both records have the fields of `version_fields`, and `admission` also has `name`, `status` and
`reason`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedtune import __version__
from fedtune.core.errors import Refused

PROTOCOL = 5
_RELEASE = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,31}")


class OtherProtocol(Refused):
    """The peer speaks another version of the protocol."""


def version_fields() -> dict[str, int | str]:
    """Return this end's protocol number and release, as fields of a message. Both are public, and
    the same at every site with this release."""
    return {"protocol": PROTOCOL, "release": __version__}


def check_peer(peer: str, message: Mapping[str, Any], own_role: str) -> None:
    """Check that the other end of a connection has the same protocol number as this end.

    - peer, own_role: what the error calls the other end and this one, such as "the coordinator"
    - message: the other end's message, with the fields of `version_fields`

    Errors: OtherProtocol if the numbers differ."""
    protocol = message.get("protocol")
    if type(protocol) is int and protocol == PROTOCOL:
        return
    number = str(protocol) if type(protocol) is int and 0 <= protocol < 10**6 else "unknown"
    release = message.get("release")
    well_formed = isinstance(release, str) and _RELEASE.fullmatch(release) is not None
    shown = release if well_formed else "unknown"
    raise OtherProtocol(
        f"{peer} speaks protocol {number} (fedtune {shown}), {own_role} protocol {PROTOCOL} "
        f"(fedtune {__version__})",
        "the same protocol at both ends",
        "install, at one of the two ends, a release with the other end's protocol; what was spent "
        "stays spent, and the study goes on with --resume",
    )
