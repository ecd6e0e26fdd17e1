"""Finished runs into one small student, at the coordinator: `fedtune distill`.

Guarantee: reads the runs and public prompts alone, so the student has at most the runs' (ε, δ)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.bases.find import Base, find_base
from fedtune.config import BaseTable, LoraTable, ObjectiveTable, PublicTable, Study
from fedtune.data.dataset import Dataset
from fedtune.data.load import dataset_of
from fedtune.data.records import Record
from fedtune.data.tokenize import prompt_ids
from fedtune.derive import derived_run
from fedtune.derive.lineage import carried_over, parent
from fedtune.derive.prompts import Prompts, completed, read
from fedtune.derive.pruned_base import shallow
from fedtune.derive.settings import DistillSettings
from fedtune.errors import ConfigError
from fedtune.models.build import build
from fedtune.models.cache import CachedDataset
from fedtune.models.loaded import LoadedModel, load
from fedtune.models.lora import Arrays
from fedtune.models.network import Network
from fedtune.models.public_factor import public_factor
from fedtune.models.run import Run
from fedtune.models.teacher import taught_by
from fedtune.objectives import resolve
from fedtune.objectives._interface import Teacher
from fedtune.progress import OnEvent, report, told
from fedtune.run_folder import BASE, new_folder

_LAYER = re.compile(r"(\.layers?\.)(\d+)\.")
RANK = 16
HELD_OUT = 0.15  # of the prompts, to choose the epoch by: they are public, so choosing is free
METRIC = "divergence"


def distill(
    teachers: Sequence[Run],
    prompts: PublicTable,
    out: Path | str,
    *,
    student: str | None = None,
    layers: int | None = None,
    settings: DistillSettings | None = None,
    on_event: OnEvent | None = None,
) -> Run:
    """Teach a small student what finished runs say together, on public prompts.

    Args:
        prompts: public prompts, with or without completions.
        out: the new run's folder; it is whole or not there.
        student: the student's base.
        layers: or how many of the first teacher's layers the student has.
        on_event: called with ("step", {…}) as the work goes on.

    Errors: ConfigError, DataError, ModelError, InfrastructureError."""
    out, settings = Path(out), settings or DistillSettings()
    first = _first(teachers)
    models = [load(run.folder) for run in teachers]
    if (student is None) == (layers is None):
        raise ConfigError("both or neither of --student and --layers", "exactly one of the two")
    read_prompts = read(prompts)
    with told(on_event), new_folder(out) as draft:
        kept = None
        if layers is not None:
            texts = _texts(read_prompts, first, models[0])
            kept = shallow(models[0].base, layers, draft / BASE, texts)
        base = find_base(student or str(draft / BASE))
        _same_words(models, base)
        table = _table(base, first.lora, kept, settings)
        study = _study(first, base, student or BASE, out, table)
        network = build(study, base)
        network.draw_factor(settings.seed)
        marked = _marked(models, read_prompts, study, network, settings)
        if base.kind == "causal" and len(marked.examples) > table.rank:
            # A where public text varies: a random one learns far less from as few prompts
            network.load_frozen(public_factor(network, marked, table.rank))
        start = network.initial(network.frozen_factor())
        network.load_trainable(start)
        if kept is not None:
            start |= _inherited(start, teachers[0].adapter(), first, study, kept)
        quality = _learn(network, marked, start, settings)
        network.save(draft / "adapter")
        body = quality | _about(study, base, network, settings, read_prompts)
        if kept is not None:
            body["derived"]["settings"]["layers"] = ", ".join(map(str, kept))
        pairs = zip(teachers, models, strict=True)
        came = carried_over([parent(run, model, "teacher") for run, model in pairs])
        body["derived"]["parents"] = came.pop("parents")
        derived_run.write(draft, study, body | came)
    return Run(out)


def _first(teachers: Sequence[Run]) -> Study:
    study = teachers[0].study
    objective = resolve(study.objective)
    if objective.record_format == "preference" and objective.outputs:
        raise ConfigError(
            f"{teachers[0].folder}: a reward model teaches no answers", "a model that answers"
        )
    return study


def _same_words(models: Sequence[LoadedModel], base: Base) -> None:
    """Next tokens mean the same to teachers and student. Errors: ConfigError."""
    from fedtune.bases.find import load_tokenizer

    if all(model.head is not None for model in models):
        return
    words = load_tokenizer(base).get_vocab()
    for model in models:
        if model.tokenizer.get_vocab() != words:
            raise ConfigError(
                f"the student {base.name} and the teacher {model.base.name} have other tokens",
                "one tokenizer",
                "choose a student of the same family, or --layers",
            )


def _texts(prompts: Prompts, first: Study, teacher: LoadedModel) -> list[np.ndarray]:
    """The bare prompts as the base reads them: what is fitted to them heard no teacher."""
    table = first.objective
    rows = [prompt_ids(r.prompt, table, teacher.tokenizer) for r in prompts.records]
    return [np.array(ids[: table.max_length], dtype=np.int32) for ids in rows]


def _inherited(
    start: Arrays, taught: Arrays, first: Study, study: Study, kept: Sequence[int]
) -> Arrays:
    """Those arrays of `start` that can begin as the first teacher's: of the matrices that the
    student has too, at no smaller rank. kept: which of the teacher's layers the student's are."""
    assert study.lora is not None
    scale = first.lora.scaling / study.lora.scaling if first.lora else 1.0
    found: Arrays = {}
    for name, own in start.items():
        value = taught.get(_LAYER.sub(lambda m: f"{m[1]}{kept[int(m[2])]}.", name))
        if value is None or any(a > b for a, b in zip(value.shape, own.shape, strict=True)):
            continue
        part = tuple(slice(size) for size in value.shape)
        found[name] = own.copy()
        found[name][part] = value * (scale if "lora_B" in name else 1.0)
    return found


def _table(
    base: Base, taught: LoraTable | None, kept: Sequence[int] | None, settings: DistillSettings
) -> LoraTable:
    """The student's adapter. kept: which of the teacher's layers it has, if it has any."""
    like = taught if kept is not None else None
    rank = settings.rank or (like.rank if like else RANK)
    last, modules = settings.last_layers or None, settings.modules
    if like and settings.last_layers is None:
        last, modules = like.last_layers, modules or like.modules
        if last and kept:  # of as many as stayed
            last = sum(at > kept[-1] - last for at in kept)
    modules = modules or _modules(base, last)
    return LoraTable(rank=rank, alpha=2.0 * rank, modules=modules, last_layers=last, train="AB")


def _study(first: Study, base: Base, name: str, out: Path, lora: LoraTable) -> Study:
    """The first teacher's plan with the student's base and adapter: what `fedtune evaluate` and
    `generate` read."""
    table = first.objective
    label = resolve(table).record_format == "label"
    kept: dict[str, Any] = {"name": "classify" if label else "causal_lm", "options": {}}
    pinned = BaseTable(model=name, digest=base.digest, dtype="auto")
    changes: dict[str, Any] = {"base": pinned, "lora": lora, "public": None}
    changes["objective"] = table.model_copy(update=kept)
    return derived_run.derived_study(first, out, "student", **changes)


def _modules(base: Base, last_layers: int | None) -> tuple[str, ...]:
    """In the last layer its MLP alone: each position then stands for itself, and learns quickly."""
    if base.kind == "encoder":
        return ("query", "value", "dense")
    mlp = ("gate_proj", "up_proj", "down_proj")
    return mlp if last_layers == 1 else ("q_proj", "v_proj", *mlp)


def _marked(
    models: Sequence[LoadedModel],
    prompts: Prompts,
    study: Study,
    network: Network,
    settings: DistillSettings,
) -> Dataset:
    """The prompts as the student reads them, each with what the teachers say of it."""
    table: ObjectiveTable = study.objective
    records: list[Record] = prompts.records
    if not table.labels:
        records, left_out = completed(records, models[0], table, settings.new_tokens, settings.seed)
        prompts.about["without_an_answer"] = sum(left_out.values())
    spec = Teacher("", "", settings.temperature, settings.top)
    teach = taught_by(models, table, spec)
    return dataset_of(records, study, network.tokenizer, teach)


# ----------------------------------------------------------------------------------- learning


def _learn(
    network: Network, data: Dataset, start: Arrays, settings: DistillSettings
) -> dict[str, Any]:
    """AdamW on the divergence from the teachers, from `start`; the epoch that is best on held-out
    prompts stays. Returns the report's "quality"."""
    from fedtune.objectives.distill import divergence

    cached = CachedDataset(network, data)
    draw = np.random.default_rng(settings.seed)
    order = draw.permutation(len(data.examples))
    held = order[: max(1, round(HELD_OUT * len(order)))].tolist()
    rest = order[len(held) :].tolist()
    parameters = list(network.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = max(1, settings.epochs * -(-len(rest) // settings.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1
    )

    def losses(rows: list[int]) -> list[torch.Tensor]:
        batches = cached.batches(rows, 2048)
        return [divergence(network, b, settings.temperature) for b in batches]

    @torch.no_grad()
    def measured() -> float:
        return float(torch.cat(losses(held)).mean())

    before = measured()
    network.load_trainable(start)
    history = [{"round": 0, METRIC: measured()}]
    best: tuple[float, Arrays] = (history[0][METRIC], start)
    for epoch in range(1, settings.epochs + 1):
        shuffled = draw.permutation(rest).tolist()
        for at in range(0, len(shuffled), settings.batch):
            rows = shuffled[at : at + settings.batch]
            for batch in cached.batches(rows, 2048):
                each = divergence(network, batch, settings.temperature)
                torch.autograd.backward(each.sum() / len(rows))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done = (epoch - 1) * len(rest) + at + len(rows)
            report("the student is learning", done, settings.epochs * len(rest))
        history.append({"round": epoch, METRIC: measured()})
        if history[-1][METRIC] < best[0]:
            best = history[-1][METRIC], network.trainable()
    network.load_trainable(best[1])
    quality = {
        "metric": METRIC,
        "on": f"{len(held)} public prompts that the student did not learn from",
        "columns": ["student's base", "student"],
        "before": {METRIC: before},
        "after": {METRIC: best[0]},
        "by_round": history,
    }
    return {"quality": quality}


def _about(
    study: Study, base: Base, network: Network, settings: DistillSettings, prompts: Prompts
) -> dict[str, Any]:
    assert study.lora is not None
    size = sum(p.numel() for p in network.model.parameters())
    return {
        "base": {
            "name": study.base.model,
            "digest": base.digest,
            "licence": base.licence,
            "dtype": str(network.dtype).removeprefix("torch."),
            "parameters": size,
        },
        "adapter": derived_run.adapter_facts(study.lora),
        "derived": {
            "step": "distilled",
            "prompts": prompts.about,
            "settings": vars(settings)
            | study.lora.model_dump(include={"rank", "last_layers"})
            | {"modules": ", ".join(study.lora.modules)},
        },
    }
