"""The coordinator and the sites of test_tls.py, each run as a process of its own.

    tls_roles.py coordinator ROOT PORT NODES OUT BUNDLE | tls_roles.py site SITE.toml [once]

A site's app is a fixed function of the site's name and the adapter; `average` is a small FedAvg.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.core.config import Study, load_site
from fedtune.core.errors import FedtuneError
from fedtune.core.wire.arrays import unpack_arrays
from fedtune.flower import api
from fedtune.flower.packing import unpack
from fedtune.flower.records import to_record
from tests.flower.own_app import join_with

if TYPE_CHECKING:
    from fedtune.launch.coordinator import Link

ROUNDS = 2


def app(message: Message, context: Context) -> Message:
    """Half way from the adapter to a point that only this site knows."""
    name = load_site(Path(str(context.node_config["site"]))).site.name
    about = ConfigRecord({"name": name, "settings": json.dumps(dict(context.run_config))})
    if message.metadata.message_type == "query.prepare":
        return Message(RecordDict({"site": about}), reply_to=message)
    if message.content.config_records["round"]["round"] == 99:
        raise ValueError(f"{name} holds a secret")
    adapter = unpack_arrays(message.content.array_records["adapter"])["a"]
    goal = np.random.default_rng(list(name.encode())).normal(size=adapter.shape)
    update = to_record({"a": (0.5 * (goal - adapter)).astype(np.float32)})
    return Message(RecordDict({"update": update, "site": about}), reply_to=message)


def average(grid: Grid, _study: Study, _out: Path, **_: Any) -> dict[str, Any]:
    """Two rounds of FedAvg over every connected site."""
    prepared = ask(grid, "query.prepare", {"plan": ConfigRecord({"digest": "d"})})
    about = {node: reply.content.config_records["site"] for node, reply in prepared}
    names = {node: str(site["name"]) for node, site in about.items()}
    adapter = np.zeros((4, 3), dtype=np.float32)
    for number in range(1, ROUNDS + 1):
        content = {
            "round": ConfigRecord({"round": number}),
            "adapter": to_record({"a": adapter}),
        }
        replies = dict(ask(grid, "train", content))
        updates = [
            unpack_arrays(replies[node].content.array_records["update"])["a"]
            for node in sorted(replies, key=lambda node: names[node])
        ]
        adapter = adapter + np.mean(updates, axis=0, dtype=np.float32)
    settings = sorted({str(site["settings"]) for site in about.values()})
    return {"sites": sorted(names.values()), "settings": settings, "adapter": adapter.tolist()}


def ask(grid: Grid, kind: str, content: dict[str, Any]) -> list[tuple[int, Message]]:
    """Send every site the same content, and wait for every answer."""
    return answers(grid, send(grid, kind, content))


def send(grid: Grid, kind: str, content: dict[str, Any]) -> list[str]:
    nodes = grid.get_node_ids()
    return list(
        grid.push_messages([grid.create_message(RecordDict(content), kind, n, "1") for n in nodes])
    )


def answers(grid: Grid, waiting: list[str]) -> list[tuple[int, Message]]:
    replies: list[tuple[int, Message]] = []
    while waiting:
        for message in grid.pull_messages(waiting):
            waiting.remove(message.metadata.reply_to_message_id)
            replies.append((message.metadata.src_node_id, unpack(message)))
        time.sleep(0.05)
    return replies


def hostile(grid: Grid) -> dict[str, Any]:
    """What the sites answer to a message of another kind, and to one on which their app fails."""
    fatal = {"round": ConfigRecord({"round": 99})}
    sent = {kind: send(grid, kind, fatal) for kind in ("evaluate", "train")}
    return {
        kind: [(m.has_error(), m.error.reason) for _, m in answers(grid, identities)]
        for kind, identities in sent.items()
    }


def run_coordinator(root: Path, port: int, nodes: int, out: Path, bundle: Path) -> None:
    from fedtune.launch import coordinator  # which a site would wait for

    content = bundle.read_bytes()
    coordinator.bundle = lambda: content

    def rounds(grid: Grid, study: Study, out: Path, **options: Any) -> dict[str, Any]:
        while len(list(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        body = average(grid, study, out, **options)
        gateways[-1]._process.kill()  # the sites come back through the one that follows it
        body["again"] = len(ask(grid, "query.prepare", {"plan": ConfigRecord({"digest": "d"})}))
        return body | hostile(grid) | {"stranger": stranger(links[0])}

    home, links, superlink = root / "coordinator", [], coordinator.superlink
    gateways: list[coordinator.Child] = []

    class Watched(coordinator.Child):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            gateways.append(self)

    coordinator.Child = Watched

    @contextmanager
    def watched(home: Path) -> Iterator[Link]:
        with superlink(home) as link:
            links.append(link)
            yield link

    coordinator.superlink = watched
    body = coordinator.serve(root / "study.toml", out, port=port, home=home, run=rounds)
    out.write_text(json.dumps(body))


def stranger(link: Link) -> int:
    """The HTTP status that someone without the executor's secret gets when asking for a task."""
    runtime = api.Runtime(link.address, b"a guess", link.ca)
    try:
        runtime.acquire([api.SERVER_APP])
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    finally:
        runtime.close()
    return 200


def say(name: str, facts: dict[str, Any]) -> None:
    print(name, json.dumps(facts), flush=True)


def main(role: str, *rest: str) -> None:
    try:
        if role == "coordinator":
            root, port, nodes, out, bundle = rest
            run_coordinator(Path(root), int(port), int(nodes), Path(out), Path(bundle))
        else:
            join_with(app, Path(rest[0]), once="once" in rest, on_event=say, patience=1.0)
    except FedtuneError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
