"""Finished runs into one small student, at the coordinator: `fedtune distill`.

Guarantee: reads the runs and public prompts alone, so the student has at most the runs' (ε, δ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedtune
from fedtune import report as reports
from fedtune.config import BaseTable, LoraTable, ObjectiveTable, PublicTable, Study
from fedtune.data.records import Record
from fedtune.data.tokens import Dataset, dataset_of
from fedtune.errors import ConfigError
from fedtune.files import replace
from fedtune.lineage import carried_over, parent
from fedtune.models.base import Base, find_base
from fedtune.models.cache import Cached
from fedtune.models.lora import Arrays
from fedtune.models.network import Network, build
from fedtune.models.public import public_factor
from fedtune.models.shallow import shallow
from fedtune.models.teacher import taught_by
from fedtune.models.whole import Whole, load
from fedtune.objectives import Teacher, find
from fedtune.progress import report
from fedtune.public_prompts import Prompts, completed, read
from fedtune.runs import BASE, new_folder

HELD_OUT = 0.15  # of the prompts, to choose the epoch by: they are public, so choosing is free
METRIC = "divergence"


@dataclass(frozen=True)
class Settings:
    """The student's adapter, and how it learns. new_tokens: of the teacher's answer to a prompt
    without a completion. last_layers 0: adapters in all layers."""

    rank: int = 16
    last_layers: int = 0
    modules: tuple[str, ...] = ()
    epochs: int = 10
    batch: int = 8
    learning_rate: float = 1e-3
    temperature: float = 1.0
    top: int = 64
    new_tokens: int = 64
    seed: int = 0


def distill(
    teachers: Sequence[Path],
    file: PublicTable,
    out: Path,
    *,
    student: str | None = None,
    layers: int | None = None,
    settings: Settings = Settings(),
) -> dict[str, Any]:
    """Teach a student on the base `student`, or on the first teacher's with `layers` of its layers,
    what `teachers` (finished runs) say together; returns the report's body.

    `out` looks like a run, and is whole or not there. Errors: ConfigError, DataError, ModelError,
    InfrastructureError."""
    models = [load(run) for run in teachers]
    first = _first(models, teachers)
    if (student is None) == (layers is None):
        raise ConfigError("give exactly one of --student and --layers")
    prompts = read(file)
    with new_folder(out) as draft:
        if layers is not None:
            shallow(models[0].base, layers, draft / BASE)
        base = find_base(student or str(draft / BASE))
        _same_words(models, base)
        study = _study(first, base, BASE if layers is not None else student or "", out, settings)
        network = build(study, str(base.path))
        network.draw_factor(settings.seed)
        marked = _marked(models, prompts, study, network, settings)
        if base.kind == "causal" and len(marked.examples) > settings.rank:
            # A where public text varies: a random one learns far less from as few prompts
            network.load_frozen(public_factor(network, marked, settings.rank))
        network.load_trainable(network.initial(network.frozen_factor()))
        body = _learn(network, marked, settings)
        network.save(draft / "adapter")
        replace(draft / "plan.json", (study.model_dump_json(indent=2) + "\n").encode())
        body |= _about(study, base, network, settings, prompts)
        pairs = zip(teachers, models, strict=True)
        came = carried_over([parent(run, model, "teacher") for run, model in pairs])
        body["derived"]["parents"] = came.pop("parents")
        body |= came
        reports.write(draft, body)
    return body


def _first(models: Sequence[Whole], runs: Sequence[Path]) -> Study:
    for model, run in zip(models, runs, strict=True):
        if model.study is None:
            raise ConfigError(f"{run}: not a run folder", "finished runs as teachers")
    study = models[0].study
    assert study is not None
    if find(study.objective).shape == "pair" and find(study.objective).outputs:
        raise ConfigError(f"{runs[0]}: a reward model teaches no answers", "a model that answers")
    return study


def _same_words(models: Sequence[Whole], base: Base) -> None:
    """Next tokens mean the same to teachers and student. Errors: ConfigError."""
    from fedtune.models.base import load_tokenizer

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


def _study(first: Study, base: Base, name: str, out: Path, settings: Settings) -> Study:
    """The first teacher's plan with the student's base and adapter: what `fedtune evaluate` and
    `generate` read."""
    table = first.objective
    label = find(table).shape == "label"
    kept: dict[str, Any] = {"name": "classify" if label else "causal_lm", "options": {}}
    modules = settings.modules or _modules(base, settings.last_layers)
    lora = LoraTable(
        rank=settings.rank,
        alpha=2.0 * settings.rank,
        modules=modules,
        last_layers=settings.last_layers or None,
        train="AB",
    )
    pinned = BaseTable(model=name, digest=base.digest, dtype="auto")
    named = first.study.model_copy(update={"name": out.name.strip("._-") or "student"})
    changes: dict[str, Any] = {"study": named, "base": pinned, "lora": lora, "public": None}
    return first.model_copy(update=changes | {"objective": table.model_copy(update=kept)})


def _modules(base: Base, last_layers: int) -> tuple[str, ...]:
    """In the last layer its MLP alone: each position then stands for itself, and learns quickly."""
    if base.kind == "encoder":
        return ("query", "value", "dense")
    mlp = ("gate_proj", "up_proj", "down_proj")
    return mlp if last_layers == 1 else ("q_proj", "v_proj", *mlp)


def _marked(
    models: Sequence[Whole], prompts: Prompts, study: Study, network: Network, settings: Settings
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


def _learn(network: Network, data: Dataset, settings: Settings) -> dict[str, Any]:
    """AdamW on the divergence from the teachers; the epoch that is best on held-out prompts stays.
    Returns the report's "quality"."""
    from fedtune.objectives import distill as objective

    cached = Cached(network, data)
    draw = np.random.default_rng(settings.seed)
    order = draw.permutation(len(data.examples))
    held = order[: max(1, round(HELD_OUT * len(order)))].tolist()
    rest = order[len(held) :].tolist()
    parameters = list(network.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = settings.epochs * -(-len(rest) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1
    )

    def losses(rows: list[int]) -> list[torch.Tensor]:
        batches = cached.batches(rows, 2048)
        return [objective.losses(network, b, temperature=settings.temperature) for b in batches]

    @torch.no_grad()
    def measured() -> float:
        return float(torch.cat(losses(held)).mean())

    history = [{"round": 0, METRIC: measured()}]
    best: tuple[float, Arrays] = (history[0][METRIC], network.trainable())
    for epoch in range(1, settings.epochs + 1):
        shuffled = draw.permutation(rest).tolist()
        for start in range(0, len(shuffled), settings.batch):
            rows = shuffled[start : start + settings.batch]
            for batch in cached.batches(rows, 2048):
                each = objective.losses(network, batch, temperature=settings.temperature)
                torch.autograd.backward(each.sum() / len(rows))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done = (epoch - 1) * len(rest) + start + len(rows)
            report("the student is learning", done, settings.epochs * len(rest))
        history.append({"round": epoch, METRIC: measured()})
        if history[-1][METRIC] < best[0]:
            best = history[-1][METRIC], network.trainable()
    network.load_trainable(best[1])
    quality = {
        "metric": METRIC,
        "on": f"{len(held)} public prompts that the student did not learn from",
        "columns": ["student's base", "student"],
        "before": {METRIC: history[0][METRIC]},
        "after": {METRIC: best[0]},
        "by_round": history,
    }
    return {"quality": quality}


def _about(
    study: Study, base: Base, network: Network, settings: Settings, prompts: Prompts
) -> dict[str, Any]:
    assert study.lora is not None
    size = sum(p.numel() for p in network.model.parameters())
    return {
        "fedtune": fedtune.__version__,
        "study": study.study.name,
        "plan_digest": study.digest,
        "base": {
            "name": study.base.model,
            "digest": base.digest,
            "licence": base.licence,
            "dtype": str(network.dtype).removeprefix("torch."),
            "parameters": size,
        },
        "adapter": {"folder": "adapter"} | study.lora.model_dump(mode="json", exclude_none=True),
        "rounds": [],
        "derived": {
            "step": "distilled",
            "prompts": prompts.about,
            "settings": vars(settings) | {"modules": ", ".join(study.lora.modules)},
        },
    }
