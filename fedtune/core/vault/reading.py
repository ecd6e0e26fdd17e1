"""Read a site's records as training does, and report at the site how many were used, left out or
cut.

Guarantee: this report stays at the site: on its screen, in the log of the process that reads, and
in a file in the state folder that only its user can read. No log.jsonl, metric, message or tracker
gets a count of records. The only events with counts are the log lines that the vault sends to the
process that started it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.core.config import Site, SiteData, Study
from fedtune.core.config.state_files import COUNTS
from fedtune.core.data.dataset import Dataset, Example, Failed, SoftTargets
from fedtune.core.data.declared_size import describe_wrong_size
from fedtune.core.data.load import load_dataset
from fedtune.core.data.reader import Reader
from fedtune.core.data.records import Record, unit_member
from fedtune.core.errors import InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.core.ledger.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedtune.core.models.cache import CachedDataset

log = logging.getLogger("fedtune.site")
OF_COUNTS = 2**14  # counts.json is padded to a multiple of this many bytes
SHOWN = 20  # rejected rows that are listed
shown: set[str] = set()  # texts about a site's rows that this process has shown on its screen
HALF = 0.5  # share of a median record; if less is read, there is a warning


def read_for_training(
    data: SiteData,
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    reader: Reader | None,
    ledger: Ledger | None,
    soft_targets: Callable[[Record, Example], SoftTargets] | None = None,
) -> Dataset:
    """Read a site's dataset and return it, without the patients who withdrew. If this dataset was
    declared to share no patient with another one, the patients who already take part in the other
    are left out too (`Ledger.disjoint_member_test`).

    - data: the table of site.toml that names the records: [data] or [evaluation]
    - study: the study by which records are rendered, tokenised and capped
    - tokenizer: the base's tokenizer
    - reader: reads the images or other files of a record, if the base takes more than text; None:
      the base takes only text
    - ledger: the site's lifetime ledger, which is only read; None if the site has none yet, and
      then nobody is left out
    - soft_targets: the function that gives a teacher's targets for a record; None: no teacher

    Errors: DataError if the path or the columns cannot be used, whatever the records hold."""
    if ledger is None:
        return load_dataset(
            data, study, tokenizer, strict=False, soft_targets=soft_targets, reader=reader
        )
    withdrawn, elsewhere = ledger.withdrawn(), ledger.disjoint_member_test(data.name)

    def is_excluded(patient: str) -> bool:
        key = unit_member(patient)
        return ledger.hashed(key) in withdrawn or elsewhere(key)

    return load_dataset(
        data,
        study,
        tokenizer,
        exclude_unit=is_excluded,
        is_known_member=ledger.member_test(data.name),
        strict=False,
        soft_targets=soft_targets,
        reader=reader,
    )


def without_withdrawn(cached: CachedDataset, ledger: Ledger) -> CachedDataset:
    """Return the dataset `cached` without the patients who have withdrawn since it was read. If
    nobody has, return `cached` itself. ledger: the ledger with the withdrawals."""
    withdrawn, dataset = ledger.withdrawn(), cached.dataset
    left = dataset.exclude_units(lambda key: ledger.hashed(key) in withdrawn)
    return cached if left.n_units == dataset.n_units else cached.of(left)


def describe(dataset: Dataset, study: Study, declared: int) -> str:
    """Describe in one line, for the site's own screen, how many of a dataset's rows were used,
    rejected or left out. declared: the site's declared number of units, with which the true number
    is compared."""
    counts, unit = dataset.counts, study.unit
    of_units = f" of {dataset.n_units:,} patients" if unit == "patient" else ""
    parts = [f"{len(dataset.examples):,} of {counts.rows:,} rows train{of_units}"]
    if dataset.n_cut:
        share = dataset.share_read
        read = f" (of a median record {share:.0%} is read)" if share < 1 else ""
        warned = "WARNING: " if share < HALF else ""
        parts.append(f"{warned}{dataset.n_cut:,} of them cut to objective.max_length{read}")
    for number, what in (
        (counts.filtered, "left out by data.filter"),
        (counts.withheld, "of patients who did not agree to their use"),
        (counts.over_cap, f"over max_records_per_unit = {study.max_records_per_unit}"),
        (counts.excluded, "of patients who withdrew or take part elsewhere"),
        (counts.duplicates, "repeat an earlier row (kept)"),
    ):
        if number:
            parts.append(f"{number:,} {what}")
    if dataset.rejected:
        parts.append(f"rejected: {by_reason(dataset.rejected)}{_remedy(dataset.rejected)}")
    parts += describe_wrong_size(dataset.n_units, declared, unit)
    return "; ".join(parts)


def _remedy(rejected: Counter[str]) -> str:
    """Return advice, in brackets, on how to avoid rejected rows. rejected: the number of rows by
    reason. Return "" if there is no advice for these reasons."""
    remedies = {
        "unknown label": "labels that the plan does not name",
        "not UTF-8": '[data] encoding = "latin-1", or another, reads it',
    }
    told = [remedies[reason] for reason in rejected if reason in remedies]
    return f" ({'; '.join(told)})" if told else ""


def by_reason(rejected: Counter[str]) -> str:
    """Format counts by reason as one text, the most frequent first, such as "12 unknown label, 3
    not UTF-8"."""
    return ", ".join(f"{number:,} {reason}" for reason, number in rejected.most_common())


def rows_of(failed: Sequence[Failed]) -> str:
    """List the first SHOWN rejected rows by file and row, in one text; "" if there are none. This
    text is for the site's screen only, since the name of a file may contain a patient's name."""
    listed: dict[tuple[str, str], list[str]] = {}
    for file, row, reason in failed[:SHOWN]:
        listed.setdefault((file, reason), []).append(str(row) if row else "all")
    parts = [
        f"{file} row {', '.join(numbers)} ({reason})" for (file, reason), numbers in listed.items()
    ]
    more = f"; and {len(failed) - SHOWN:,} more" if len(failed) > SHOWN else ""
    return "; ".join(parts) + more


def keep_counts(site: Site, data: SiteData, study: Study, dataset: Dataset) -> None:
    """Write how many of a dataset's rows were used, left out or cut to counts.json in the state
    folder, readable by this user only (0600), and log a warning about records that are left out or
    cut.

    - site: the site, whose declared size is written beside the counts
    - data: the table of site.toml that names the records; its earlier counts are replaced, those of
      other datasets stay
    - study: the study for which the records were read
    - dataset: the records that were read, with their counts

    The file takes the same space on disk whatever the counts are. If the disk refuses the file, log
    a warning."""
    counts = dataset.counts
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "study": study.study.name,
        "unit": study.unit,
        "declared_size": site.site.declared_size,
        "units": dataset.n_units,
        "rows": counts.rows,
        "train": len(dataset.examples),
        "cut": dataset.n_cut,
        "rejected": dict(dataset.rejected),
        "filtered": counts.filtered,
        "withheld": counts.withheld,
        "over_cap": counts.over_cap,
        "excluded": counts.excluded,
        "duplicates": counts.duplicates,
    }
    path = site.site.state / COUNTS
    try:
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        earlier = earlier if isinstance(earlier, dict) else {}
    except (OSError, ValueError):
        earlier = {}
    try:
        text = json.dumps(earlier | {data.name: facts}, indent=1).encode()
        whole = math.ceil(len(text) / OF_COUNTS) * OF_COUNTS
        replace(path, text.ljust(whole), private=True)
    except InfrastructureError as error:
        log.warning("%s", error)
    if dataset.rejected or dataset.n_cut or counts.over_cap:
        line = describe(dataset, study, site.site.declared_size)
        if line not in shown:
            log.warning("%s: %s; `fedtune data report` lists the rows", data.where, line)
