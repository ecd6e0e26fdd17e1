"""The process that forks a child for each unit's images, recordings or clips; core/data/media.py
starts it.

It reads no file of a record. It imports the modules that decode such files, since a child may open
no file."""

from __future__ import annotations

import gc
import time
from functools import partial

from fedtune.core.data import child_process, decoding
from fedtune.core.data.media import Kind
from fedtune.core.errors import ConfigError


def main() -> None:
    """Run this process: fork children that decode the kind of files that settings["kind"] names. If
    the libraries for it are missing, tell the process that started this one."""
    control, settings = child_process.begin()
    kind = settings["kind"]
    try:
        decoding.import_decoders(kind)
    except ConfigError as error:
        child_process.say(control, "settings", str(error))
        return
    gc.freeze()  # so that a child does not copy what it never changes
    child_process.serve(control, partial(_decode, kind), settings)


def _decode(kind: Kind, given: bytes) -> bytes:
    time.monotonic = lambda: 0.0  # PyAV asks for the time, which a child may not learn
    return decoding.answer(kind, given) if given else b'{"kind": "ready"}'


if __name__ == "__main__":
    main()
