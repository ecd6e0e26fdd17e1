"""A site whose answers wait for a person, asked as its courier asks it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.config import Site, load_site, save
from fedtune.core.config.checked import checked_file, keep_checked
from fedtune.core.registry import process_cache
from fedtune.core.vault.answers import Place, answer
from fedtune.core.vault.declared import declare
from fedtune.core.vault.worker import SiteWorker, worker
from fedtune.core.wire.arrays import bodies, pack_arrays
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import Answer, Request
from fedtune.core.wire.seal import digest_beside, order, sign_plan
from fedtune.public.start import Start
from tests.client.site_kit import begun, make_site, notes


@dataclass
class Asked:
    """A site, and the coordinator that asks it. `path`: its site file."""

    path: Path
    made: Start
    key: SigningKey = field(default_factory=SigningKey)
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.place = Place(str(self.path))

    @property
    def site(self) -> Site:
        return load_site(self.path)

    @property
    def worker(self) -> SiteWorker:
        return worker(self.place.site).of_run(self.made.study.digest)

    @property
    def checked(self) -> str:
        """Where the tables are that a person's start checked; each vault process is given it."""
        return str(checked_file(self.site))

    def edit(self, **tables: dict[str, Any]) -> None:
        """Change keys of site.toml, by table."""
        save(self.site.changed(**tables), self.path)

    def start(self) -> None:
        """A person starts the site, after it was checked."""
        keep_checked(self.site)
        self.restart()

    def restart(self) -> None:
        """What the vault's process held in its memory is gone."""
        process_cache.clear("workers")

    def plan(self) -> Request:
        study = self.made.study
        plan = {"study": study.model_dump_json(), "digest": study.digest}
        plan |= {**sign_plan(self.key, study.digest), **version_fields()}
        return Request("prepare", {"plan": plan}, pack_arrays(self.made.frozen))

    def prepare(self) -> Answer:
        return answer(self.place, self.plan())

    def request(self, kind: Any = "train", round_: int = 1, suffix: str = "") -> Request:
        arrays = pack_arrays(encode(self.made.adapter, self.made.study.wire.adapter))
        about = self.made.study.digest + suffix, round_, "0" * 32, ""
        signed = order(self.key, *about, beside=digest_beside(bodies(arrays)))
        return Request(kind, {"order": signed}, arrays)

    def train(self, round_: int = 1) -> Answer:
        return answer(self.place, self.request(round_=round_))

    def paid(self) -> int:
        return len(self.worker.ledger.charges("records"))

    def events(self) -> list[tuple[str, str]]:
        lines = (self.site.site.state / "audit.jsonl").read_text().splitlines()
        return [(entry["event"], entry["rule"]) for entry in map(json.loads, lines)]

    def set_policy(self, answers: str) -> None:
        other = {"held": "immediate", "immediate": "held"}[answers]
        text = self.path.read_text()
        self.path.write_text(text.replace(f'answers = "{other}"', f'answers = "{answers}"'))


def a_site(
    folder: Path, base: Path, answers: str = "held", declared: str = "", **changes: Any
) -> Asked:
    """A site that has admitted a plan. declared: what its data is declared to be; "" for private
    data."""
    notes(folder)
    path = folder / "site.toml"
    rules = {"answers": answers, "allow_declared_data": bool(declared)}
    save(make_site(folder, rules, patient="who"), path)
    if declared:
        text = path.read_text().replace("[data]\n", f'[data]\ndeclared = "{declared}"\n')
        path.write_text(text)
        declare(load_site(path))
    asked = Asked(path, begun(base, **changes))
    asked.start()
    assert asked.prepare().status == "admitted"
    return asked


def contents(answer: Answer) -> bytes:
    """All that an answer holds of arrays."""
    return b"".join(bodies(answer.arrays)[name] for name in sorted(answer.arrays))
