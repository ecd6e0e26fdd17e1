"""Compare candidate bases on this machine, and choose the smallest that meets a target.

Only the study's public files are read: its plan, its public text and its evaluation records. The
metric at an ε is predicted from gradients of the evaluation records; no site is asked."""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.core import boot
from fedtune.core.config import PrivacyTable, Study, study_from_json
from fedtune.core.config.known_bases import KNOWN, PREFIX
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example
from fedtune.core.errors import ConfigError, FedtuneError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives import Objective
from fedtune.core.progress import OnEvent, report, told
from fedtune.core.registry.metrics import METRICS


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate base.

    - model: its name and, if it was not measured with the study's own quantisation, the method
    - parameters: the number of its weights
    - memory: peak memory in bytes of the process that measured it
    - tokens: how many tokens a first forward pass handles per second
    - step: how many records a training step handles per second
    - base: the value of the study's metric for the base alone
    - predicted: ε -> the predicted metric after the study; None if nothing was predicted
    - up, down: how many bytes a site sends, and receives, in a round
    - failed: why the base was not measured; "" if it was"""

    model: str
    parameters: int = 0
    memory: int = 0
    tokens: float = 0.0
    step: float = 0.0
    base: float | None = None
    predicted: dict[str, float] | None = None
    up: int = 0
    down: int = 0
    failed: str = ""


@dataclass(frozen=True)
class Fit:
    """The result of comparing bases with a target.

    - metric, target: the study's metric, and the value that it should reach
    - by: which value of each base was compared with the target, in words: the metric predicted at
      the study's ε, or the metric of the base alone
    - rows: the bases, sorted by number of parameters
    - chosen: the name of the smallest base whose value meets the target; None if none does"""

    metric: str
    target: float
    by: str
    rows: list[Row]
    chosen: str | None

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)


def choose_base(
    study: Study,
    target: float,
    models: Sequence[str] = (),
    *,
    sites: int = 3,
    size: int = 200,
    epsilons: Sequence[float] = (),
    quantised: Sequence[str] = (),
    on_event: OnEvent | None = None,
) -> Fit:
    """Measure candidate bases for a study, and name the smallest that meets a target. Return a Fit:
    this name, and what was measured of every base.

    Args:
        target: the value that the study's metric should reach.
        models: the names of the candidates; by default the study's base and the known language
            models that need no model hub.
        sites, size: the metric is predicted for this number of sites, each of this declared size.
        epsilons: further values of ε at which to predict; the study's own is always among them.
        quantised: methods of quantisation, "nf4" or "int8", with which to measure each base too,
            besides the study's own.
        on_event: called with ("step", {…}) to report progress.

    The study's public text and evaluation records are read, and no record of a site. Each base is
    measured in a process of its own.

    Errors: ConfigError (no [evaluation], or an unknown method of quantisation)."""
    models = models or known_bases(study)
    if study.evaluation is None:
        raise ConfigError(
            "the study has no [evaluation] table", "an [evaluation] table with path and columns"
        )
    if unknown := set(quantised) - {"nf4", "int8"}:
        raise ConfigError(f"--quantised {min(unknown)}: no such method", "nf4 or int8")
    all_epsilons = sorted({*epsilons, *_study_epsilons(study)}, reverse=True)
    rows: list[Row] = []
    candidates = [(model, method) for model in models for method in (None, *quantised)]
    with told(on_event):
        for number, (model, method) in enumerate(candidates):
            report("measuring bases, one process each", number, len(candidates))
            rows.append(_measure_apart(study, model, method, sites, size, all_epsilons))
    rows.sort(key=lambda row: (row.parameters or math.inf, row.memory))
    metric = study.evaluation.metric
    own_epsilons = _study_epsilons(study)
    any_predicted = any(row.predicted for row in rows)
    by = (
        f"predicted at ε = {own_epsilons[0]:g}"
        if own_epsilons and any_predicted
        else "of the untouched base"
    )
    figures = [
        (
            row.model,
            row.predicted[f"{own_epsilons[0]:g}"] if own_epsilons and row.predicted else row.base,
        )
        for row in rows
        if not row.failed and (row.predicted or not any_predicted)
    ]
    high = METRICS[metric].higher_is_better
    meets = [m for m, v in figures if v is not None and (v >= target if high else v <= target)]
    return Fit(metric, target, by, rows, meets[0] if meets else None)


def known_bases(study: Study) -> list[str]:
    """Return the names of the study's own base and of the known language models that need no model
    hub."""
    carried = [PREFIX + name for name, entry in KNOWN.items() if entry.kind == "causal"]
    return list(dict.fromkeys([study.base.model, *carried]))


def _study_epsilons(study: Study) -> list[float]:
    from fedtune.core.dp.plan import plan_for_site

    if not study.private:
        return []
    epsilon = study.privacy.epsilon if isinstance(study.privacy, PrivacyTable) else None
    return [epsilon or round(plan_for_site(study, 10**6).epsilon, 3)]


def _measure_apart(
    study: Study, model: str, method: str | None, sites: int, size: int, epsilons: list[float]
) -> Row:
    """Measure a candidate base in a separate process, so that the measured peak memory is its own.
    Return its Row. If it could not be measured, the Row's `failed` says why.

    - study: the plan, in which the candidate takes the base's place
    - model: the candidate, by the name that a plan would give it
    - method: the quantisation, "nf4" or "int8"; None: as the study has it
    - sites, size: the metric is predicted for this number of sites, each of this declared size
    - epsilons: the values of ε at which to predict the metric; []: nothing is predicted"""
    plan = study.model_dump(mode="json")
    plan["base"] |= {"model": model, "digest": None}
    name = model
    if method:
        dtype = "bfloat16" if study.base.dtype == "auto" else study.base.dtype
        plan["base"] |= {"dtype": dtype, "quantisation": {"method": method}}
        name = f"{model}, {method}"
    if plan["lora"]:
        plan["lora"]["a_digest"] = None
    request = {"study": json.dumps(plan), "sites": sites, "size": size, "epsilons": epsilons}
    process = subprocess.run(
        boot.command("fedtune.evaluation.compare_bases"),
        env=boot.environment(),
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    try:
        return Row(model=name, **json.loads(process.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Row(name, failed=f"the process that measured it ended with {process.returncode}")


# ------------------------------------------------------------------------------- one candidate


def measure(study: Study, sites: int, size: int, epsilons: Sequence[float]) -> Row:
    """Measure the base of `study` in this process: its speed and memory, the bytes of a round, and
    the metric, now and as predicted after the study. Return these as a Row.

    - study: the plan, with an [evaluation] table
    - sites, size: the metric is predicted for this number of sites, each of this declared size
    - epsilons: the values of ε at which to predict the metric; (): nothing is predicted

    Errors: ModelError, ConfigError, DataError."""
    from fedtune.core.data.load import load_dataset
    from fedtune.core.wire.codec import layout, shapes
    from fedtune.evaluation.evaluator import Evaluator
    from fedtune.public.start import start

    initial = start(study)
    study, objective = initial.study, study.objective.resolved
    assert study.evaluation is not None  # `choose_base` has checked it
    network = _network(study, initial.frozen)
    data = CachedDataset(network, load_dataset(study.evaluation, study, network.tokenizer))
    all_rows = range(len(data.dataset.examples))
    tokens = sum(len(p.input_ids) for e in data.dataset.examples for p in e.passages)
    before = time.perf_counter()
    with torch.no_grad():
        for batch in data.batches(all_rows):
            objective.losses(network, batch)
    seconds = time.perf_counter() - before
    evaluator = Evaluator(study, initial.frozen)
    base = evaluator.measure(None)[evaluator.metric]
    network.load_trainable(initial.adapter)
    step, predicted = _predict_accuracy(study, network, data, sites, size, epsilons)
    up, down = (
        sum(form.nbytes for form in layout(shapes(initial.adapter), encoding).values())
        for encoding in (study.wire.update, study.wire.adapter)
    )
    return Row(
        model=study.base.model,
        parameters=sum(map(_weight_count, network.model.parameters())),
        memory=_peak_memory(),
        tokens=tokens / seconds,
        step=step,
        base=base,
        predicted=predicted,
        up=up,
        down=down,
    )


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes."""
    if platform.system() == "Linux":  # where ru_maxrss is at least the parent's peak
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _weight_count(parameter: torch.nn.Parameter) -> int:
    """Count the weights in a parameter. If it is quantised to 4 bits, each of its elements holds
    two."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state else parameter.numel()


def _network(study: Study, frozen: Any) -> Network:
    from fedtune.core.models.build import build

    network = build(study)
    network.adopt(study, frozen)
    return network


def _predict_accuracy(
    study: Study,
    network: Network,
    data: CachedDataset,
    sites: int,
    size: int,
    epsilons: Sequence[float],
) -> tuple[float, dict[str, float] | None]:
    """Measure the speed of a training step, and predict the accuracy after the study. Return two
    things: the speed, in records per second, and a dict from each ε to the accuracy predicted at
    this ε. If the metric is not accuracy, or there are no classes or no ε, the second is None.

    - study: the plan, for its objective, clipping and privacy
    - network: the model, with the arrays with which the study would start
    - data: the evaluation records, over this network
    - sites, size: the accuracy is predicted for this number of sites, each of this declared size
    - epsilons: the values of ε; the keys of the dict are these values as texts (format code g)

    The prediction imitates a whole study by one step. v is the sum of clipped gradients over half
    of the evaluation records, scaled to `sites` · `size` units; each site adds noise, whose size
    `_noise` returns. Each record of the other half gets the class whose gradient has the largest
    inner product with v. The accuracy is averaged over both halves. It is a rough guide: it
    separated hopeless from learnable settings, and predicted 0.49 where a run reached 0.77."""
    from fedtune.core.training.unit_gradients import UnitGradientEngine

    objective, table = study.objective.resolved, study.evaluation
    engine = UnitGradientEngine(data, objective)
    n = len(data.dataset.examples)
    halves = [torch.arange(n) % 2 == 0, torch.arange(n) % 2 == 1]
    began = time.perf_counter()
    sums = [_sum_clipped(engine, half, study) for half in halves]
    rate = n / (time.perf_counter() - began)
    classes = _classes(study, objective, network, data.dataset)
    if classes is None or table is None or table.metric != "accuracy" or not epsilons:
        return rate, None
    candidates, gold = classes
    class_count = len(candidates.examples) // n
    engine = UnitGradientEngine(CachedDataset(network, candidates), objective)
    generator = torch.Generator().manual_seed(study.study.seed)
    c = study.clipping.max_grad_norm if study.clipping else 1.0
    noise = [c * math.sqrt(sites) * _noise(study, size, e) for e in epsilons]
    correct = torch.zeros(len(epsilons))
    for fit_half, test_half in (halves, halves[::-1]):
        mean = sums[0 if fit_half is halves[0] else 1] * (sites * size / int(fit_half.sum()))
        noise_direction = torch.randn(len(mean), generator=generator)
        directions = torch.stack([mean + sigma * noise_direction for sigma in noise], dim=1)
        rows = [
            r * class_count + k
            for r in torch.nonzero(test_half)[:, 0].tolist()
            for k in range(class_count)
        ]
        place = {row: at for at, row in enumerate(rows)}
        scores = torch.empty(len(rows), len(noise))
        for chunk in engine(rows):
            scores[[place[row] for row in chunk.rows]] = chunk.flat().cpu() @ directions
        best = scores.view(-1, class_count, len(noise)).argmax(dim=1)
        correct += (best == torch.from_numpy(gold)[test_half][:, None]).float().sum(dim=0)
    return rate, {f"{e:g}": float(correct[at]) / n for at, e in enumerate(epsilons)}


def _sum_clipped(engine: Any, half: torch.Tensor, study: Study) -> torch.Tensor:
    """Return the sum (d,) of the records' clipped gradients.

    - engine: computes the records' gradients
    - half: (n,) booleans, true for each record to be added
    - study: says how to clip; without a [clipping] table nothing is clipped"""
    from fedtune.core.dp.clip import scales

    total = torch.zeros(engine.dimension)
    for chunk in engine(torch.nonzero(half)[:, 0].tolist()):
        rows, clipping = chunk.flat().cpu(), study.clipping
        if clipping:
            by = scales([rows], clipping.max_grad_norm, clipping.mode, clipping.gamma)
            rows = rows * by[:, None].float()
        total += rows.sum(dim=0)
    return total


def _noise(study: Study, size: int, epsilon: float) -> float:
    """Return the standard deviation of the noise that one site adds over a whole study at this ε,
    as if it added all of this noise in one step. The unit is the clipping norm. The result is
    σ/(q√T), where σ is the noise multiplier, q the sampling rate and T the number of steps. size:
    the site's declared size."""
    from fedtune.core.dp.plan import plan_for_site

    assert isinstance(study.privacy, PrivacyTable)
    changes = {"epsilon": epsilon, "noise_multiplier": None}
    privacy = study.privacy.model_copy(update=changes)
    plan = plan_for_site(study.model_copy(update={"privacy": privacy}), size)
    return plan.noise_multiplier / (plan.sampling_rate * math.sqrt(plan.steps))


def _classes(
    study: Study, objective: Objective, network: Network, data: Dataset
) -> tuple[Dataset, np.ndarray] | None:
    """Pair every record with every class. Return a data set with all these pairs, and an array (n,)
    with the index of each record's true class. Return None if the study has no classes, or if it
    distils a teacher, which would have to compute targets for each class.

    - study: the plan, whose labels or evaluation.choices are the classes
    - objective: the plan's objective, resolved
    - network: the model, whose tokenizer is used
    - data: n evaluation records

    With K classes, the pair of record i and class k has number i · K + k in the data set. The index
    of the true class is -1 if the record's completion is none of the choices."""
    from fedtune.evaluation.choices import with_choice

    table = study.evaluation
    labels = range(len(study.objective.labels))
    if objective.teacher_spec is not None:
        return None
    if objective.record_format == "label" and labels:
        candidates = [
            Example(e.input_ids, e.target_ids, k, e.unit) for e in data.examples for k in labels
        ]
        gold = np.array([e.label for e in data.examples])
    elif objective.record_format == "text" and table is not None and len(table.choices) > 1:
        ids = [network.tokenizer.encode(c, add_special_tokens=False) for c in table.choices]
        end = [network.tokenizer.eos_token_id] * study.objective.append_eos
        candidates = [with_choice(e, i + end) for e in data.examples for i in ids]
        true = [e.target_ids[e.target_ids != NO_TARGET].tolist() for e in data.examples]
        gold = np.array([next((k for k, i in enumerate(ids) if t == i + end), -1) for t in true])
    else:
        return None
    units = [Example(e.input_ids, e.target_ids, e.label, u) for u, e in enumerate(candidates)]
    return Dataset(units, len(units), data.rejected), gold


def main() -> None:
    """Run as a program that measures one candidate base: read the request, in JSON, from standard
    input, and print the candidate's row, in JSON, as the last line on standard output."""
    request = json.load(sys.stdin)
    try:
        study = study_from_json(request["study"])
        row = asdict(measure(study, request["sites"], request["size"], request["epsilons"]))
    except FedtuneError as error:
        row = asdict(Row("", failed=str(error)))
    row.pop("model")
    print("\n" + json.dumps(row))


if __name__ == "__main__":
    main()
