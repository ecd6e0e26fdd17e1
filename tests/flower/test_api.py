"""Flower's private names that fedtune leans on: they exist, in one file, for the pinned version."""

from __future__ import annotations

import ast
import threading
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import flwr.app
import pytest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

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
        if path.name == "private.py" and path.parent.name == "flower":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                assert module.partition(".")[0] != "flwr" or module in PUBLIC, (path, module)


def test_parts_that_are_on_their_way_are_looked_for_again_soon(monkeypatch):
    """With Flower's own pauses a site waited a second and more for each message."""
    waits, asked = [], Counter()

    class Stop(threading.Event):
        def wait(self, seconds):
            waits.append(seconds)

    quick = SimpleNamespace(Event=Stop, Lock=threading.Lock)
    monkeypatch.setattr(inflatable_utils, "threading", quick)
    content = flwr.app.RecordDict({"c": flwr.app.ConfigRecord({"round": 1})})
    objects = {name: each.deflate() for name, each in get_all_nested_objects(content).items()}

    def pulled(name):
        asked[name] += 1
        if asked[name] < 7:
            raise inflatable_utils.ObjectUnavailableError(name)
        return objects[name]

    used = api.run_clientapp.pull_task_input.__globals__["pull_and_inflate_object_from_tree"]
    arrived = used(get_object_tree(content), pulled, lambda name: None)
    assert arrived["c"]["round"] == 1 and len(waits) == 6 * len(objects)
    assert min(waits) < 0.03 and max(waits) <= 0.6
