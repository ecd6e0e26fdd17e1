"""What a case of the property is: rows, a plan, a place and what happens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.config import Study
from fedtune.core.wire.keys import SigningKey
from fedtune.public.start import Start, start

COORDINATOR = SigningKey()
PEERS = (SigningKey(), SigningKey())  # with which noise is shared, where a plan says so
SIZE = 12  # declared
DIRECTIONS = 4  # of class statistics
PUBLIC = "public"  # among the bases: a file of public text
CLASSIFIES = "classifier"  # a base: a run that learnt the labels
Ids = Mapping[str, Path]  # bases by name


@dataclass(frozen=True)
class Row:
    """A row of a file, there from version `since` to before `until`. body: its columns, a line as
    it stands (JSONL), or a list of cells (CSV). A value (kind, seed, shape …) is a media file."""

    owner: str
    body: Any
    since: int = 0
    until: int = 99


@dataclass(frozen=True)
class Plan:
    """A study, by what matters to who is summed."""

    name: str = "one"
    objective: str = "causal_lm"
    base: str = "llama"
    unit: str = "patient"
    drawn: str = "unit"
    q: float = 1.0
    cap: int = 2
    steps: int = 1
    rounds: int = 3
    sigma: float = 4.0
    engine: str = "auto"
    lora: str = "cut"  # cut, whole, narrow (by site) or none: a head alone
    mode: str = "flat"
    overflow: str = "reject"
    max_length: int = 48
    template: str | None = None
    life: float | None = None  # ε of a study without a last round
    queries: bool = False
    clip: float = 0.5
    rate: float = 0.1
    asked: float = 4.0  # σ of a query
    apart: bool = False  # whether a query tells units apart, by class and by a column
    teacher: str | None = None  # of distill: a base, or a run that classifies
    shared: bool = False  # one dose of noise for three sites, of which one may collude
    public: bool = False  # a preconditioner, and an adapter that starts trained

    @property
    def labelled(self) -> bool:
        return self.teacher == CLASSIFIES

    def study(self, bases: Ids) -> Study:
        privacy: dict[str, Any] = {"delta": 1e-4, "unit": self.unit, "noise_multiplier": self.sigma}
        privacy |= {"sampling": self.drawn, "max_records_per_unit": self.cap}
        training: dict[str, Any] = {"sampling_rate": self.q, "learning_rate": self.rate}
        training |= {"local_steps": self.steps, "engine": self.engine}
        objective: dict[str, Any] = {"name": self.objective, "max_length": self.max_length}
        objective |= {"template": self.template, "overflow": self.overflow}
        if self.objective == "distill":
            teacher = str(bases[self.teacher or self.base])
            objective["options"] = {"teacher": teacher, "digest": digest_of(teacher)}
        if self.objective in ("classify", "prototypes") or self.labelled:
            objective["labels"] = ["y", "n"]
        if self.objective == "prototypes":
            objective["options"] = {"directions": DIRECTIONS}
        body: dict[str, Any] = {
            "study": {"name": self.name},
            "base": {"model": str(bases[self.base]), "dtype": "float32"},
            "objective": objective,
            "training": training,
            "clipping": {"max_grad_norm": self.clip, "mode": self.mode},
            "privacy": privacy,
            "wire": {"adapter": "float32"},
        }
        if self.lora != "none":
            modules = ["query", "value"] if self.base == "bert" else ["q_proj", "v_proj"]
            modules = ["q_proj", "projector"] if self.base == "llava" else modules
            body["lora"] = {"rank": 2, "alpha": 4.0, "modules": modules}
            if self.lora == "cut":
                body["lora"]["last_layers"] = 1
            if self.lora == "narrow":
                body["lora"]["min_rank"] = 1
        if self.public:
            columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
            columns = {"prompt": "q", "completion": "a"} if self.objective != "dpo" else columns
            body["public"] = {"path": str(bases[PUBLIC]), "licence": "CC0", "columns": columns}
            body["lora"]["preconditioner"] = {"rank": 8}
            body["start"] = {"steps": 2, "learning_rate": 0.01}
        if self.objective == "prototypes":
            columns = {"text": "q"}
            body["public"] = {"path": str(bases[PUBLIC]), "licence": "CC0", "columns": columns}
            body["strategy"] = {"name": "discriminant"}
        if self.life is not None:
            privacy["epsilon"] = self.life
            body["schedule"] = {"every": "1h"}
            columns = {"prompt": "q", "completion": "a"}
            body["evaluation"] = {"path": "public.jsonl", "columns": columns}
        else:
            training["rounds"] = self.rounds
        if self.shared:
            body["secure_aggregation"] = {"colluding": 1}
            body["strategy"] = body.get("strategy", {}) | {"min_sites": 1 + len(PEERS)}
        if self.queries:
            body["private_evaluation"] = {"noise_multiplier": self.asked, "every": 1}
        if self.queries and self.apart:
            body["private_evaluation"]["groups"] = {"side": ["y", "n"]}
            if "labels" in objective:
                body["private_evaluation"] |= {"classes": True, "score": "accuracy"}
        return Study.model_validate(body, strict=False)


@lru_cache
def digest_of(base: str) -> str:
    from fedtune.core.models.loaded import load

    return load(base).digest


@lru_cache
def begun(plan: Plan, bases: tuple[tuple[str, Path], ...]) -> Start:
    """As an honest coordinator begins, but for a length that it would not ask for."""
    length = 48 if plan.public else min(plan.max_length, 48)  # a short one leaves no public text
    made = start(replace(plan, max_length=length).study(dict(bases)))
    objective = made.study.objective.model_copy(update={"max_length": plan.max_length})
    return replace(made, study=made.study.model_copy(update={"objective": objective}))


COLUMNS = {
    "causal_lm": 'prompt = "q", completion = "a"',
    "distill": 'prompt = "q", completion = "a"',
    "classify": 'text = "q", label = "a"',
    "prototypes": 'text = "q", label = "a"',
    "kto": 'prompt = "q", completion = "a", label = "l"',
    "dpo": 'prompt = "q", chosen = "a", rejected = "b"',
    "orpo": 'prompt = "q", chosen = "a", rejected = "b"',
    "reward": 'prompt = "q", chosen = "a", rejected = "b"',
    "image": 'image = "file", completion = "a", prompt = "q"',
    "audio": 'audio = "file", text = "a"',
}


@dataclass(frozen=True)
class Place:
    """A site file: which files it reads, under which names. All places share name and ledger."""

    columns: str = COLUMNS["causal_lm"]
    data: str = "records"
    patient: bool = True
    apart: tuple[str, ...] = ()
    held_out: str | None = None  # the file of [evaluation]
    held_apart: bool = False
    rank: int | None = None
    policy: str = ""
    consent: str = ""  # of CONSENT
    who: str = "who"  # the patient column
    scan: str = ""  # an action of [data.scan]
    sheet: bool = False  # whether the policy asks for an attested data sheet
    memory: float | None = None  # GiB for states at the cut; 0: all go to the disk

    def toml(self, kinds: Mapping[str, str], teachers: list[str]) -> str:
        columns = self.columns + (f', patient = "{self.who}"' if self.patient else "")
        lines = ["[site]", 'name = "a"', f"declared_size = {SIZE}", 'state = "state"']
        lines += [f"lora_rank = {self.rank}"] if self.rank else []
        lines += [] if self.memory is None else [f"cache_memory = {self.memory}"]
        lines += ["[data]", f'name = "{self.data}"', *where_of(self.data, kinds)]
        lines += [f"columns = {{ {columns} }}", f"disjoint_from = {json.dumps(self.apart)}"]
        scan = f'scan = {{ action = "{self.scan}" }}' if self.scan else ""
        lines += [CONSENT[self.consent], scan]
        if self.held_out:
            lines += ["[evaluation]", f'name = "{self.held_out}"', f"columns = {{ {columns} }}"]
            lines += where_of(self.held_out, kinds)
            lines += [f'disjoint_from = ["{self.data}"]'] if self.held_apart else []
            lines += ['groups = { side = "b" }']
            lines += [CONSENT[self.consent], scan]
        lines += ["[policy]", 'bases = "any"', "max_delta = 1e-4", "min_noise_multiplier = 0.0"]
        lines += ['release = ["evaluation"]', self.policy or WIDE]
        lines += [f'data_sheet = ["{SHEET}"]'] if self.sheet else []
        lines += [f"teachers = {json.dumps(teachers)}", "max_fallback_epsilon = 1e6"]
        lines += [f"peers = {json.dumps([peer.public for peer in PEERS])}"]
        return "\n".join(lines) + "\n"


SHEET = "title"  # the field of a data sheet that is asked for
OPT_OUTS, SALT = "opt-outs.txt", "salt.txt"
CONSENT = {
    "": "",
    "column": 'consent = { column = "agreed" }',
    "list": f'consent = {{ opt_outs = "{OPT_OUTS}" }}',
    "salted list": f'consent = {{ opt_outs = "{OPT_OUTS}", hashing = "hmac-sha256", '
    f'salt_file = "{SALT}" }}',
}
WIDE = "max_epsilon = 1e6\nmax_epsilon_per_study = 1e6\nmax_steps = 10000000"


FHIR = "folder-ndjson"  # a bulk export, of a file for each owner


def where_of(data: str, kinds: Mapping[str, str]) -> list[str]:
    """The lines of site.toml that say where a dataset is."""
    path = path_of(data, kinds)
    if path.endswith(".sqlite"):
        return [f'url = "sqlite:///{path}"', 'options = { table = "rows" }', f'path = "{data}"']
    if kinds.get(data) == FHIR:
        return [f'path = "{path}"', 'source = "fhir"', 'filter = { site = "here" }']
    return [f'path = "{path}"']


def path_of(data: str, kinds: Mapping[str, str]) -> str:
    kind = kinds.get(data, "jsonl")
    return f"{data}/rows" if kind.startswith("folder") else f"{data}/rows.{kind}"


Op = tuple[Any, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Crafted:
    """An adapter made for one case."""

    arrays: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Disk:
    """A disk that is full after some bytes. holds: "states" (at the cut), "state" (the site's
    folder) or "both"; share: how many bytes, from 0, what the world that needs less needs, to 1,
    what the other needs; below 0: the part of the lesser need that is missing."""

    holds: str
    share: float = 0.5

    def limit(self, needs: tuple[int, int]) -> int:
        low, high = sorted(needs)
        return (
            int(low * (1 + self.share)) if self.share < 0 else low + int(self.share * (high - low))
        )


@dataclass(frozen=True)
class Case:
    """What both worlds live through. files: rows by dataset; kinds: jsonl, csv, parquet or one of
    them in a folder of a file for each owner; unit: whom one of the worlds lacks; opted: who does
    not agree, from one version of the files to before another; processes: of the site's team; disk:
    all is lived through once more on such a disk; receipts: whether orders bring them."""

    plans: tuple[Plan, ...]
    files: Mapping[str, tuple[Row, ...]]
    ops: tuple[Op, ...]
    unit: str
    places: tuple[Place, ...] = (Place(),)
    kinds: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    forked: bool = (
        True  # the team's other processes: else they are started as `fedtune client` does
    )
    disk: Disk | None = None
    receipts: bool = False
    opted: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def has_opted_out(self, owner: str, version: int) -> bool:
        since, until = self.opted.get(owner, (99, 99))
        return since <= version < until

    def here(self, version: int) -> bool:
        """Whether the unit has a row in any file of that version."""
        every = (row for rows in self.files.values() for row in rows)
        return any(r.owner == self.unit and r.since <= version < r.until for r in every)

    @property
    def rows(self) -> int:
        """The most rows that the unit has at a time."""
        mine = [r for rows in self.files.values() for r in rows if r.owner == self.unit]
        return max((sum(o.since <= r.since < o.until for o in mine) for r in mine), default=0)
