"""Flower's private names that fedtune leans on: they exist, in one file, for the pinned version."""

from __future__ import annotations

import ast
from importlib.metadata import version
from pathlib import Path

import flwr.app
import pytest

import fedtune
from fedtune.flower import api

ROOT = Path(fedtune.__file__).parents[1]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation"}
FILES = [p for part in ("fedtune", "server", "client") for p in sorted((ROOT / part).rglob("*.py"))]


def test_flower_is_the_version_that_this_was_written_for():
    assert version("flwr").split(".")[:2] == ["1", "42"]


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_is_there(name):
    assert getattr(api, name) is not None


def test_the_error_codes_are_those_the_coordinator_explains():
    from fedtune.server.exchange import ERROR_TEXT

    assert all(isinstance(code, int) for code in ERROR_TEXT) and len(ERROR_TEXT) == 6


def test_a_message_survives_protobuf():
    metadata = flwr.app.Metadata(1, "id", 1, 2, "", "g", 0.0, 60.0, "train")
    message = api.make_message(metadata, flwr.app.RecordDict())
    proto = api.ProtoMessage.FromString(api.message_to_proto(message).SerializeToString())
    assert api.message_from_proto(proto).metadata.dst_node_id == 2


def test_private_flower_modules_are_imported_in_one_file_alone():
    for path in FILES:
        if path.name == "api.py" and path.parent.name == "flower":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                assert module.partition(".")[0] != "flwr" or module in PUBLIC, (path, module)
