"""The process that forks a child for each unit's texts, to find identifiers of persons in them;
core/data/scan.py starts it.

It reads no record. It loads presidio and spaCy's model, since a child may open no file."""

from __future__ import annotations

import gc
import logging
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fedtune.core.data import child_process, scan_engine
from fedtune.core.data.scan_findings import pack

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine


def main() -> None:
    """Run this process: fork children that scan texts with the model in settings["model"], a
    folder. If it cannot be loaded, tell the process that started this one."""
    control, settings = child_process.begin()
    logging.disable()  # a line of a log has a time, which a child may not learn
    modules: dict[str, Any] = sys.modules
    modules["torch"] = modules["transformers"] = None  # which the scan would import and not use
    try:
        analyser = scan_engine.make(Path(settings["model"]))
    except Exception as error:
        child_process.say(control, "settings", f"the scan's model: {type(error).__name__}")
        return
    _take_no_time()
    scan_engine.find(analyser, "Dr Lee rang on 4 March 2021.")  # it compiles its patterns now
    gc.freeze()  # so that a child does not copy what it never changes
    child_process.serve(control, partial(_scan, analyser), settings)


def _scan(analyser: AnalyzerEngine, given: bytes) -> bytes:
    return pack(scan_engine.find(analyser, given.decode())) if given else b'{"kind": "ready"}'


def _take_no_time() -> None:
    """Keep presidio from asking for the time, which it does for each pattern: a child may not learn
    the time."""
    from presidio_analyzer import pattern_recognizer

    timed: Any = pattern_recognizer
    timed.datetime = SimpleNamespace(datetime=SimpleNamespace(now=lambda: datetime.min))


if __name__ == "__main__":
    main()
