"""Distil finished runs into one small student, at the coordinator: `fedtune distill`.

Guarantee: only the runs and public prompts are read, so the student's (ε, δ) is at most that of the
runs together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.core.bases.find import Base, find_base
from fedtune.core.config import BaseTable, LoraTable, ObjectiveTable, PublicTable, Study
from fedtune.core.data.dataset import Dataset, Example, SoftTargets
from fedtune.core.data.load import UnitReader
from fedtune.core.data.records import Record
from fedtune.core.data.tokenize import prompt_ids
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.teacher import soft_targets_of
from fedtune.core.objectives._interface import Teacher
from fedtune.core.progress import OnEvent, report, told
from fedtune.core.run_folder import BASE, is_exported
from fedtune.derive import derived_run
from fedtune.derive.lineage import combined_lineage, parent
from fedtune.derive.prompts import Prompts, complete_prompts, read
from fedtune.derive.pruned_base import write_pruned_base
from fedtune.derive.settings import DistillSettings
from fedtune.public.factor import public_factor
from fedtune.report.run_files import new_folder
from fedtune.runs.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAYER = re.compile(r"(\.layers?\.)(\d+)\.")
RANK = 16
HELD_OUT = 0.15  # share of the prompts (public ones) by which the epoch is chosen
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
    """Distil the averaged predictions of finished runs into a small student, on public prompts.

    Args:
        teachers: the runs. Only the first one writes an answer to a prompt without a completion,
            and the student's plan is made from this run's plan.
        prompts: public prompts, with or without completions.
        out: the new run's folder. It is not made if an error occurs.
        student: the student's base: pypi:NAME, a folder or a hub id.
        layers: given in place of `student`; the student is then the first teacher's base with this
            number of its layers.
        settings: the settings of the student's adapter and training; None: the defaults of
            DistillSettings.
        on_event: called with ("step", {…}) to report progress.

    Returns the new run.

    Errors: ConfigError, DataError, ModelError, InfrastructureError."""
    out, settings = Path(out), settings or DistillSettings()
    if student and is_exported(Path(student)):
        raise ConfigError(
            f"the student's base {student} is an exported model, which was trained by a run",
            "a base, so that the student costs what its teachers cost",
        )
    first = _first_study(teachers)
    models = [load(run.folder) for run in teachers]
    if (student is None) == (layers is None):
        raise ConfigError(
            "--student and --layers are both given, or neither", "exactly one of the two"
        )
    read_prompts = read(prompts)
    with told(on_event), new_folder(out) as draft:
        kept_layers = None
        if layers is not None:
            texts = _prompt_tokens(read_prompts, first, models[0])
            kept_layers = write_pruned_base(models[0].base, layers, draft / BASE, texts)
        base = find_base(student or str(draft / BASE))
        _check_tokenizers(models, base)
        table = _student_lora(base, first.lora, kept_layers, settings)
        study = _student_study(first, base, student or BASE, out, table)
        network = build(study, base)
        network.draw_factor(settings.seed)
        dataset = _teacher_dataset(models, read_prompts, study, network, settings)
        if base.kind == "causal" and len(dataset.examples) > table.rank:
            # A spans the directions in which the prompts vary; a random A would need more prompts
            network.load_frozen(public_factor(network, dataset, table.rank))
        start = network.initial(network.frozen_factor())
        network.load_trainable(start)
        if kept_layers is not None:
            start |= _inherited_arrays(start, teachers[0].adapter(), first, study, kept_layers)
        quality = _train_student(network, dataset, start, settings)
        network.save(draft / "adapter")
        sections = quality | _report_sections(study, base, network, settings, read_prompts)
        if kept_layers is not None:
            sections["derived"]["settings"]["layers"] = ", ".join(map(str, kept_layers))
        pairs = zip(teachers, models, strict=True)
        lineage = combined_lineage([parent(run, model, "teacher") for run, model in pairs])
        sections["derived"]["parents"] = lineage.pop("parents")
        derived_run.write(draft, study, sections | lineage)
    return Run(out)


def _first_study(teachers: Sequence[Run]) -> Study:
    study = teachers[0].study
    objective = study.objective.resolved
    if objective.scores:
        raise ConfigError(
            f"{teachers[0].folder}: a reward model gives no answers to learn",
            "a run whose model answers",
        )
    return study


def _check_tokenizers(models: Sequence[LoadedModel], base: Base) -> None:
    """Check that teachers and student have the same tokenizer, which soft targets of next tokens
    require. Nothing is checked if all teachers have heads, since their targets are classes. Errors:
    ConfigError."""
    from fedtune.core.bases.find import load_tokenizer

    if all(model.head is not None for model in models):
        return
    vocabulary = load_tokenizer(base).get_vocab()
    for model in models:
        if model.tokenizer.get_vocab() != vocabulary:
            raise ConfigError(
                f"the student {base.name} and the teacher {model.base.name} have "
                "different tokenizers",
                "the same tokenizer",
                "choose a student of the same family, or --layers",
            )


def _prompt_tokens(prompts: Prompts, first: Study, teacher: LoadedModel) -> list[np.ndarray]:
    """Return the token ids of each prompt, without its answer, so that pruning does not depend on
    an answer that a teacher wrote.

    - prompts: the public prompts
    - first: the first teacher's plan, for the template and the largest length
    - teacher: the first teacher, for its tokenizer"""
    table = first.objective
    rows = [prompt_ids(r.prompt, table, teacher.tokenizer) for r in prompts.records]
    return [np.array(ids[: table.max_length], dtype=np.int32) for ids in rows]


def _inherited_arrays(
    start: Arrays, teacher_arrays: Arrays, first: Study, study: Study, kept_layers: Sequence[int]
) -> Arrays:
    """Initialise the student's adapter from the first teacher's. Return the new values by name. An
    array is in the result only if the teacher has an array for this layer, and its rank is not
    larger than the student's. If it is smaller, the remaining part is as in `start`.

    - start: the student's trainable arrays as they were initialised so far, by name
    - teacher_arrays: the first teacher's adapter, by name
    - first, study: the plans of the first teacher and of the student, for the scaling of each
    - kept_layers: the teacher's layers that the student keeps, by index"""
    assert study.lora is not None
    scale = first.lora.scaling / study.lora.scaling if first.lora else 1.0
    inherited: Arrays = {}
    for name, student_array in start.items():
        value = teacher_arrays.get(_LAYER.sub(lambda m: f"{m[1]}{kept_layers[int(m[2])]}.", name))
        if value is None or any(
            a > b for a, b in zip(value.shape, student_array.shape, strict=True)
        ):
            continue
        part = tuple(slice(size) for size in value.shape)
        inherited[name] = student_array.copy()
        inherited[name][part] = value * (scale if "lora_B" in name else 1.0)
    return inherited


def _student_lora(
    base: Base,
    teacher_lora: LoraTable | None,
    kept_layers: Sequence[int] | None,
    settings: DistillSettings,
) -> LoraTable:
    """Build the student's LoRA table.

    - base: the student's base, whose kind gives the modules if nothing else names them
    - teacher_lora: the first teacher's table; None if this teacher trained only a head
    - kept_layers: the teacher's layers that the student keeps, by index; None if it has another
      base, and then nothing is taken from the teacher's table
    - settings: rank, modules and number of last layers. What they leave open is taken from the
      teacher's table, or else is a default. If they give the number of last layers, only the rank
      may be taken from the teacher's table"""
    inherited = teacher_lora if kept_layers is not None else None
    rank = settings.rank or (inherited.rank if inherited else RANK)
    last, modules = settings.last_layers or None, settings.modules
    if inherited and settings.last_layers is None:
        last, modules = inherited.last_layers, modules or inherited.modules
        if last and kept_layers:  # count the teacher's adapted layers that the student has
            last = sum(at > kept_layers[-1] - last for at in kept_layers)
    modules = modules or _default_modules(base, last)
    return LoraTable(rank=rank, alpha=2.0 * rank, modules=modules, last_layers=last, train="AB")


def _student_study(first: Study, base: Base, name: str, out: Path, lora: LoraTable) -> Study:
    """Build the student's plan, which `fedtune evaluate` and `generate` read: the first teacher's
    plan with the student's base and adapter.

    - first: the first teacher's plan
    - base: the student's base, pinned by its digest
    - name: base.model of the plan: the base as the caller named it, or BASE for a base that was
      written to the run's folder
    - out: the new run's folder, from whose name the study's is made
    - lora: the student's table"""
    table = first.objective
    label = table.resolved.record_format == "label"
    name_and_options: dict[str, Any] = {"name": "classify" if label else "causal_lm", "options": {}}
    pinned = BaseTable(model=name, digest=base.digest, dtype="auto")
    changes: dict[str, Any] = {"base": pinned, "lora": lora, "public": None}
    changes["objective"] = table.model_copy(update=name_and_options)
    return derived_run.derived_study(first, out, "student", **changes)


def _default_modules(base: Base, last_layers: int | None) -> tuple[str, ...]:
    """Return the names of the modules of a base that get an adapter if neither the settings nor a
    teacher name them. last_layers: how many of the last layers get one; None: all. If only one
    layer of a language model gets one, the modules are the MLP's only, so that each position trains
    by itself."""
    if base.kind == "encoder":
        return ("query", "value", "dense")
    mlp = ("gate_proj", "up_proj", "down_proj")
    return mlp if last_layers == 1 else ("q_proj", "v_proj", *mlp)


def _teacher_dataset(
    models: Sequence[LoadedModel],
    prompts: Prompts,
    study: Study,
    network: Network,
    settings: DistillSettings,
) -> Dataset:
    """Tokenise the prompts for the student, each with the teachers' soft targets.

    - models: the teachers; unless they classify, the first one writes an answer to each prompt that
      has no completion
    - prompts: the public prompts; the number of those that got no answer and are left out is noted
      in prompts.about, for the report
    - study: the student's plan
    - network: the student, for its tokenizer
    - settings: these give temperature and size of the soft targets, and length and seed of the
      completions"""
    table: ObjectiveTable = study.objective
    records: list[Record] = prompts.records
    if not table.labels:
        records, left_out = complete_prompts(
            records, models[0], table, settings.new_tokens, settings.seed
        )
        prompts.about["without_an_answer"] = sum(left_out.values())
    spec = Teacher("", "", settings.temperature, settings.top)
    soft_targets = soft_targets_of(models, table, spec)
    return dataset_of(records, study, network.tokenizer, soft_targets)


# ----------------------------------------------------------------------------------- learning


def _train_student(
    network: Network, data: Dataset, start: Arrays, settings: DistillSettings
) -> dict[str, Any]:
    """Train the student from `start`, with AdamW, to minimise its divergence from the teachers. At
    the end it has the arrays of the epoch with the lowest divergence on held-out prompts. Return
    {"quality": the section of this name for the report}.

    - network: the student, which at first computes what its base computes
    - data: the public prompts with soft targets; a share HELD_OUT of them is not trained on
    - start: the trainable arrays with which the training begins, by name
    - settings: these give epochs, batch, learning rate, temperature and seed"""
    from fedtune.core.objectives.distill import divergence

    cached = CachedDataset(network, data)
    draw = np.random.default_rng(settings.seed)
    order = draw.permutation(len(data.examples))
    held_out_rows = order[: max(1, round(HELD_OUT * len(order)))].tolist()
    train_rows = order[len(held_out_rows) :].tolist()
    parameters = list(network.parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    steps = max(1, settings.epochs * -(-len(train_rows) // settings.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.1
    )

    def losses(rows: list[int]) -> list[torch.Tensor]:
        batches = cached.batches(rows, 2048)
        return [divergence(network, b, settings.temperature) for b in batches]

    @torch.no_grad()
    def measure_loss() -> float:
        return float(torch.cat(losses(held_out_rows)).mean())

    before = measure_loss()
    network.load_trainable(start)
    history = [{"round": 0, METRIC: measure_loss()}]
    best: tuple[float, Arrays] = (history[0][METRIC], start)
    for epoch in range(1, settings.epochs + 1):
        shuffled = draw.permutation(train_rows).tolist()
        for at in range(0, len(shuffled), settings.batch):
            rows = shuffled[at : at + settings.batch]
            for batch in cached.batches(rows, 2048):
                row_losses = divergence(network, batch, settings.temperature)
                torch.autograd.backward(row_losses.sum() / len(rows))
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            records_done = (epoch - 1) * len(train_rows) + at + len(rows)
            report("the student is learning", records_done, settings.epochs * len(train_rows))
        history.append({"round": epoch, METRIC: measure_loss()})
        if history[-1][METRIC] < best[0]:
            best = history[-1][METRIC], network.trainable()
    network.load_trainable(best[1])
    quality = {
        "metric": METRIC,
        "on": f"{len(held_out_rows)} public prompts that the student did not learn from",
        "columns": ["student's base", "student"],
        "before": {METRIC: before},
        "after": {METRIC: best[0]},
        "by_round": history,
    }
    return {"quality": quality}


def _report_sections(
    study: Study, base: Base, network: Network, settings: DistillSettings, prompts: Prompts
) -> dict[str, Any]:
    """Return the report's sections "base", "adapter" and "derived" of a student.

    - study, base, network: the student's plan, base and trained network
    - settings: the settings of the distillation
    - prompts: the public prompts; the report gets the facts about them (prompts.about)"""
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


def dataset_of(
    records: list[Record],
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    soft_targets: Callable[[Record, Example], SoftTargets] | None = None,
) -> Dataset:
    """Build a dataset of public records, each a unit of its own. A record that cannot be used is
    left out and counted in the dataset's `rejected`.

    - records: the public records, whose order the dataset keeps. In a study of labels a record may
      lack its label; in other studies a record without a completion cannot be used
    - study: the plan, whose objective says how a record is read
    - tokenizer: the tokenizer of the base for which the dataset is made
    - soft_targets: computes a record's soft targets; None: the records get none

    Errors: DataError if no record can be used."""
    objective = study.objective.resolved
    labelled, scored = objective.record_format != "label", objective.outputs > 0
    unit_reader = UnitReader(
        study.objective,
        tokenizer,
        objective.record_format,
        scored,
        labelled,
        soft_targets=soft_targets,
    )
    units = [unit_reader([record]) for record in records]
    rejected = Counter(reason for unit in units for _, reason in unit.rejected)
    usable = [example for unit in units for example in unit.examples]
    examples = [replace(example, unit=number) for number, example in enumerate(usable)]
    if not examples:
        raise DataError(f"none of {len(records)} public records can be used ({dict(rejected)})")
    return Dataset(examples, len(examples), rejected)
