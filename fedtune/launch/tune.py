"""Search a study's settings on data that the sites declare public or generated: `fedtune tune`."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedtune.core.config import Site, Study, load_study
from fedtune.core.errors import ConfigError, FedtuneError, PolicyRefused
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.registry.metrics import metric as known_metric
from fedtune.report.preference import alarms
from fedtune.runs.run import Run

INDEX = "tune.json"  # in the folder of a search: the settings of each trial
RATE = "training.learning_rate"
# The grid without --set: POINTS learning rates from the plan's divided by SPAN to the plan's times
# SPAN.
POINTS, SPAN = 5, 10.0


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    - settings: the trial's settings, as texts in the form of `--set`
    - folder: the name of the run's folder
    - value: the metric on the records by which trials are compared; None if the run failed
    - loss: the loss on the same records, which decides between equal values; None if not measured
    - epsilon: the largest ε of a site; None if the run states none
    - error: why the run failed; "" if it did not
    - warning: for a preference run, the first warning of report.preference.alarms; "" if none"""

    settings: tuple[str, ...]
    folder: str
    value: float | None = None
    epsilon: float | None = None
    error: str = ""
    loss: float | None = None
    warning: str = ""


@dataclass(frozen=True)
class Search:
    """A finished search and its trials, the best first, and the failed ones last.

    metric: the metric by which the trials are sorted. records: the name of the records on which the
    metric was measured."""

    metric: str
    records: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """Return the best trial; None if all failed."""
        return next((trial for trial in self.trials if trial.value is not None), None)


def tune(
    study: Path | str,
    sites: Sequence[Site],
    out: Path | str,
    settings: Sequence[str] = (),
    trials: int | None = None,
    records: Path | None = None,
    on_trial: Callable[[int, int, Trial], None] | None = None,
) -> Search:
    """Run a study once for each of several settings, on declared data only, and sort the trials.

    Args:
        study: the study.toml.
        sites: sites whose data is declared public or generated.
        out: the folder of the search; each trial is a run in OUT/trial-NN. A search that was
            interrupted, or that is repeated with more settings, keeps the finished trials.
        settings: texts "key=a,b,c"; all combinations of several keys are tried. If no key has
            several values, learning rates around the plan's are tried.
        trials: the largest number of trials. If there are more combinations, this many are drawn at
            random, by the study's seed. If no key has several values, this is the number of
            learning rates. None: all combinations, or five learning rates.
        records: for a study without [selection], the file of records by which trials are compared,
            with the columns of [evaluation]. The [evaluation] records never decide between trials.
        on_trial: called when a trial ends, with its number, the number of trials, and the trial.

    A trial that fails is listed with its error. Errors: PolicyRefused if a site's data is private,
    or was ever charged as private; ConfigError if another home pays for a site's data, if there are
    no records by which to compare, `out` is not the folder of a search, or a setting is invalid."""
    from fedtune.core.vault.declared import declare
    from fedtune.homes.known_homes import check_simulated
    from fedtune.homes.opening import check_ledger_stands

    loaded, out = (
        load_study(study, settings=[s for s in settings if len(_values(s)) < 2]),
        Path(out),
    )
    check_declared(sites)
    _check_chooser(loaded, records)
    for site in sites:
        check_simulated(site)
        check_ledger_stands(site.home)
        declare(site)
    metric = loaded.evaluation.metric if loaded.evaluation else "loss"
    chooser = "[selection]" if loaded.selection else str(records)
    known = _index(out)
    done: list[Trial] = []
    chosen = _draw_combinations(_grid(loaded, settings, trials), trials, loaded.study.seed)
    for number, combination in enumerate(chosen, 1):
        folder = known.setdefault(combination, f"trial-{len(known) + 1:02}")
        table = {name: list(of) for of, name in known.items()}
        replace(out / INDEX, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())
        trial = _trial(Path(study), sites, out / folder, combination, records, metric)
        done.append(trial)
        if on_trial:
            on_trial(number, len(chosen), trial)
    return Search(metric, chooser, rank_trials(done, metric, warned_last=records is not None))


def rank_trials(trials: Sequence[Trial], metric: str, *, warned_last: bool) -> list[Trial]:
    """Sort trials, the best first and the failed ones last.

    - metric: the name of the metric, which tells whether a higher value is better
    - warned_last: whether a trial with a warning comes after all others that ran, whatever its
      value. Set it only if the warning is about the records by which trials are compared."""
    sign = -1 if known_metric(metric).higher_is_better else 1

    def key(trial: Trial) -> tuple[bool, bool, float, float]:
        value = 0.0 if trial.value is None else sign * trial.value
        warned = warned_last and bool(trial.warning)
        return trial.value is None, warned, value, trial.loss or 0.0

    return sorted(trials, key=key)


def check_declared(sites: Sequence[Site]) -> None:
    """Check that every site's data is declared public or generated. Errors: PolicyRefused."""
    private = [site.site.name for site in sites if not site.data.declared]
    if private:
        raise PolicyRefused(
            f"the data of {', '.join(private)} is private, and a search would pay for every trial",
            'data.declared = "public" or "generated" at every site',
            "search on files that no patient is in, with site.toml files that declare this; then "
            "run the private study once, with the settings that were found",
        )


def _check_chooser(study: Study, records: Path | None) -> None:
    """Check that the study has a last round, and that there are records by which trials can be
    compared. These are either the study's [selection] or the file `records` (None if no file is
    given), but not both. Errors: ConfigError."""
    if study.continuous:
        raise ConfigError(
            "a study with a [schedule] cannot be searched: it has no last round",
            "a study with training.rounds",
        )
    if study.selection is None and (records is None or study.evaluation is None):
        raise ConfigError(
            "there are no records by which to compare trials: those of [evaluation] only measure "
            "the trial that was chosen",
            "[selection] in study.toml; or [evaluation], and --records FILE with its columns",
            "set some public records apart from those of [evaluation]",
        )
    if study.selection and records is not None:
        raise ConfigError(
            "--records is given, but the study has [selection]", "only one of the two"
        )


def _values(setting: str) -> list[str]:
    """Return the values in `setting`, a text such as "key=a,b": what follows "=", split at the
    commas that are not in brackets, braces or quotes."""
    _, _, text = setting.partition("=")
    values = [""]
    depth = 0
    quote = ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not (depth or quote):
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def _grid(study: Study, settings: Sequence[str], trials: int | None) -> list[tuple[str, ...]]:
    """List the combinations of settings to try, each as texts "key=value". If no setting has
    several values, the combinations differ in the learning rate: a geometric grid around the plan's
    rate, in ascending order.

    - study: the study whose settings are varied
    - settings: texts "key=a,b,c"
    - trials: the number of learning rates; None for POINTS. It counts only if no setting has
      several values."""
    lists = [
        [f"{setting.partition('=')[0].strip()}={value}" for value in _values(setting)]
        for setting in settings
    ]
    if all(len(values) == 1 for values in lists):
        points = trials or POINTS
        powers = [2 * n / (points - 1) - 1 if points > 1 else 0.0 for n in range(points)]
        rates = [float(f"{study.training.learning_rate * SPAN**power:.3g}") for power in powers]
        lists.append([f"{RATE}={rate:g}" for rate in rates])
    return list(itertools.product(*lists))


def _draw_combinations(
    grid: list[tuple[str, ...]], trials: int | None, seed: int
) -> list[tuple[str, ...]]:
    if trials is None or len(grid) <= trials:
        return grid
    chosen = set(random.Random(seed).sample(range(len(grid)), trials))
    return [combination for number, combination in enumerate(grid) if number in chosen]


def _index(out: Path) -> dict[tuple[str, ...], str]:
    """Read the search's tune.json, and return a trial's settings -> the name of its folder; {} for
    a new search. Errors: ConfigError if `out` is not the folder of a search."""
    if not (out / INDEX).exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(
                f"{out}: not empty, and no search",
                "a new folder, or the folder of an earlier search",
            )
        return {}
    table = reading.json_in(out / INDEX, "what `fedtune tune` wrote", "choose another --out")
    return {tuple(map(str, settings)): str(name) for name, settings in table.items()}


def _trial(
    path: Path,
    sites: Sequence[Site],
    folder: Path,
    combination: tuple[str, ...],
    records: Path | None,
    metric: str,
) -> Trial:
    """Run one trial, or read its result if its run is finished.

    - path: the study.toml
    - sites: the sites of the search
    - folder: the folder of the trial's run; a run that was interrupted is continued
    - combination: the trial's settings, texts "key=value"
    - records: the file of records by which trials are compared, which replaces the study's
      [evaluation] records; None for a study with [selection]
    - metric: the name of the metric by which trials are compared

    Returns the trial with its value, or with the text of the error with which it failed."""
    from fedtune.core.registry import process_cache
    from fedtune.launch.simulate import simulate

    trial = Trial(combination, folder.name)
    try:
        study = load_study(path, settings=combination)
        if records is not None:
            study = study.changed(evaluation={"path": str(records.absolute())})
        if not (folder / "report.json").is_file():
            try:
                simulate(study, sites, folder, resume=True)
            finally:  # the next trial cannot use this one's workers
                process_cache.clear("workers")
        return _read_value(trial, Run(folder), metric)
    except FedtuneError as error:
        return _mark_failed(trial, error)


def _mark_failed(trial: Trial, error: FedtuneError) -> Trial:
    return Trial(**(asdict(trial) | {"error": " ".join(str(error).split())}))


def _read_value(trial: Trial, run: Run, metric: str) -> Trial:
    """Read from a finished run's report what decides between trials, and return `trial` with it:
    the metric on the records by which trials are compared, the loss, the largest ε and a warning.
    If the report has no number for `metric`, return `trial` with an error. run: the trial's run."""
    quality: dict[str, Any] = run.report.get("quality") or {}
    after = quality.get("after") or {}
    if rounds := quality.get("selection"):
        after = rounds[-1].get("selection") or {}
    value = after.get(metric)
    epsilon = max(run.epsilon.values(), default=None)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return Trial(trial.settings, trial.folder, None, epsilon, f"no {metric} was measured")
    loss = after.get("loss")
    loss = float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None
    warning = next(iter(alarms(quality)), "")
    return Trial(trial.settings, trial.folder, float(value), epsilon, loss=loss, warning=warning)
