"""Let sites' workers live in this process, and print as JSON what they said and what was loaded.

    python tests/docs/worker_alone.py FOLDER [MODULE]

FOLDER: of each study a folder with plan.json, its arrays, steps.json and site files, as
test_boundary.py lays them out; MODULE: imported beside the workers. Imports nothing of fedtune but
what stands here, so that what is loaded is what a worker loads."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors.numpy import load_file

from fedtune.client import secure_round
from fedtune.client.site import SiteWorker, worker
from fedtune.config import study_from_json
from fedtune.errors import FedtuneError
from fedtune.ledger.files import DATABASE
from fedtune.registry import process_cache
from fedtune.secagg.statement import parse, set_text


class Sites:
    """The workers of one study, and what it sends."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("site-*.toml"))
        self.study = study_from_json((folder / "plan.json").read_text(encoding="utf-8"))
        self.frozen = load_file(folder / "frozen.safetensors")
        self.adapter = load_file(folder / "adapter.safetensors")
        self._statements: list[str] = []

    def workers(self) -> list[SiteWorker]:
        return [worker(str(file)) for file in self.files]

    def prepare(self, _: int) -> Iterator[str]:
        for site in self.workers():
            answer = site.prepare(self.study, self.frozen)
            yield "admitted" if answer.admitted else answer.reason

    def train(self, round_: int) -> Iterator[str]:
        for site in self.workers():
            site.train(self.study.digest, round_, self.adapter)
            yield "trained"

    def query(self, round_: int) -> Iterator[str]:
        for site in self.workers():
            site.evaluate(self.study.digest, round_, self.adapter)
            yield "answered"

    def ready(self, round_: int) -> Iterator[str]:
        keys = [site.key.public for site in self.workers()]
        for site in self.workers():
            said = secure_round.ready(site, self.study.digest, round_, 1, self.adapter, "", keys)
            self._statements.append(said.said["ready"])
            yield "ready"

    def masked(self, round_: int) -> Iterator[str]:
        statements = set_text([parse(text) for text in self._statements])
        for site in self.workers():
            secure_round.masked(site, self.study.digest, round_, 1, statements, "")
            yield "masked"

    def restart(self, _: int) -> Iterator[str]:
        process_cache.clear("workers")
        yield "restarted"

    def lose_records(self, _: int) -> Iterator[str]:
        for site in self.workers():
            site.site.data.path.unlink()
            yield "lost"

    def break_ledger(self, _: int) -> Iterator[str]:
        for site in self.workers():
            (site.site.site.state / DATABASE).write_bytes(b"no ledger")
            yield "broken"


def live(folder: Path) -> list[str]:
    """Do what steps.json says; an error is said by its class."""
    sites, said = Sites(folder), list[str]()
    for name, round_ in json.loads((folder / "steps.json").read_text(encoding="utf-8")):
        step: Callable[[int], Iterator[str]] = getattr(sites, name)
        try:
            said += step(round_)
        except FedtuneError as error:
            said.append(type(error).__name__)
    return said


if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module)
    folders = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir())
    outcomes = {folder.name: live(folder) for folder in folders}
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "fedtune")
    others = sorted({name.partition(".")[0] for name in sys.modules} - {"fedtune"})
    print(json.dumps({"said": outcomes, "loaded": loaded, "others": others}))
