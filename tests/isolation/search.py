"""Search for an answer as a hostile courier would: in all that a vault says, in all files.

    python -m tests.isolation.search courier|open SITE DESCRIPTOR FOLDER

courier: confined as a site's courier is. The requests to send, and pieces of the answer to look
for, come pickled on standard input. Prints as JSON what the vault's answers were, and where the
pieces were found."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from fedtune.core.config import load_site
from fedtune.courier import process as courier


def heard(connection: Connection) -> tuple[str, bytes]:
    """An answer's status, and all of its bytes."""
    header = connection.recv_bytes()
    told = json.loads(header)
    arrays = [connection.recv_bytes() for _ in told["arrays"]]
    return told["fields"]["status"], header + b"".join(arrays)


def files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def main() -> None:
    how, path, descriptor, folder = sys.argv[1:]
    missing = courier.confine(load_site(Path(path))).missing if how == "courier" else ()
    from fedtune.core.wire.requests import send  # as a courier does: confined before

    requests, pieces = pickle.load(sys.stdin.buffer)
    connection, statuses, said = Connection(int(descriptor)), list[str](), b""
    for request in requests:
        send(connection, request)
        status, content = heard(connection)
        statuses.append(status)
        said += content
    found = ["the socket"] if any(piece in said for piece in pieces) else []
    for file in files(Path(folder)):
        try:
            content = file.read_bytes()
        except OSError:
            continue
        if any(piece in content for piece in pieces):
            found.append(file.parent.name)
    print(json.dumps({"statuses": statuses, "found": found, "missing": missing}))


if __name__ == "__main__":
    main()
