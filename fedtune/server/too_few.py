"""Build the error of a study in which too few sites take part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fedtune.core.errors import FedtuneError

E = TypeVar("E", bound=FedtuneError)


def too_few(kind: type[E], willing: int, missing: Mapping[str, str], least: int) -> E:
    """Build the error of a study in which fewer than `least` sites take part. Its text lists the
    missing sites with their reasons; sites with the same reason are listed together.

    - kind: the class of the error
    - willing: the number of sites that take part
    - missing: site -> the reason why it does not take part
    - least: strategy.min_sites"""
    alike = dict[str, list[str]]()
    for name, why in missing.items():
        alike.setdefault(why, []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in alike.items())
    return kind(
        f"{willing} sites take part" + (f" ({reasons})" if missing else ""),
        f"at least strategy.min_sites = {least}",
        "settle the reasons with these sites" if missing else "start the sites, then try again",
    )
