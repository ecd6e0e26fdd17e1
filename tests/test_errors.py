"""The tree in fedtune/core/errors.py names every error that a person may meet, under its parent."""

from __future__ import annotations

import importlib
import pkgutil
import re

import client
import fedtune
import fedtune.core.errors
import server
from fedtune.core.errors import FedtuneError


def classes() -> dict[str, type[FedtuneError]]:
    """Every error of ours: what is no FedtuneError is caught where it is raised."""
    found: dict[str, type[FedtuneError]] = {}
    for package in (fedtune, client, server):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and issubclass(value, FedtuneError):
                    found[value.__name__] = value
    return found


def tree(text: str) -> dict[str, str]:
    """Each name in the drawing, and the one that it hangs from."""
    above: list[str] = []
    found: dict[str, str] = {}
    for line in text.splitlines():
        if named := re.match(r"    ([│ ]*(?:├── |└── )?)([A-Z]\w+)\b", line):
            depth = len(named[1]) // 4
            above[depth:] = [named[2]]
            found[named[2]] = above[depth - 1] if depth else ""
    return found


def test_every_error_has_its_place_and_its_exit_code() -> None:
    drawn, every = tree(fedtune.core.errors.__doc__ or ""), classes()
    assert set(every) == set(drawn) | {"FedtuneError"}
    for name, parent in drawn.items():
        assert not parent or every[parent] in every[name].__bases__
        branch = name
        while drawn[branch] not in ("FedtuneError", ""):
            branch = drawn[branch]
        said = re.search(rf"{branch} +exit (\d)", fedtune.core.errors.__doc__ or "")
        assert branch == "FedtuneError" or (said and every[name].exit_code == int(said[1]))


def test_a_tree_that_lacks_an_error_is_seen() -> None:
    text = (fedtune.core.errors.__doc__ or "").replace("TooFew", "Toomany")
    assert set(classes()) != set(tree(text)) | {"FedtuneError"}
