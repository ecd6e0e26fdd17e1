"""Compose the site file of a new membership of a hospital's home."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from fedtune.core.config.hospital import Hospital
from fedtune.core.config.site import PASSWORD_FILE
from fedtune.core.errors import ConfigError
from fedtune.officer.hospital_file import quote, write_home
from fedtune.presets.templates import SITE

STATE = """\
state = "state"        # this membership's own folder: its signing key, network keys, plans. The
                       # ledger is in the hospital's home
"""
COLUMNS = 'prompt = "prompt"      #   prompt + completion\ncompletion = "completion"\n'
READ_BY = ("columns", "source", "options", "filter", "convert", "scan")  # keys of [data]


def site_text(home: Path, hospital: Hospital, membership: str, dataset: str | None = None) -> str:
    """Compose the site.toml of a new membership that trains on a registered dataset, with a comment
    on each line as `fedtune init --role site` writes them. If another membership trains on that
    dataset, the columns, source, options, filter, convert and scan of its [data] are copied.

    - home: the absolute path of the hospital's home, which the file names
    - hospital: the content of the home's hospital.toml
    - membership: the name of the new membership
    - dataset: its name in hospital.toml; None if the hospital has exactly one

    Errors: ConfigError if the home has no such dataset, or several and none is named."""
    names = sorted(hospital.datasets)
    if dataset is None and len(names) == 1:
        dataset = names[0]
    if dataset not in names:
        raise ConfigError(
            f"{home}: has {'several datasets' if names else 'no dataset'}, and none is named"
            if dataset is None
            else f"{home}: has no dataset {dataset!r}",
            "one of " + (", ".join(names) or "none so far"),
            "name one with --dataset, or register another in hospital.toml",
        )
    assert dataset is not None
    data, ceilings = hospital.datasets[dataset], hospital.policy
    place = f"url = {quote(data.url)}" if data.url else f"path = {quote(data.path)}"
    text = SITE.replace('"my-hospital"', quote(hospital.hospital.name))
    text = text.replace("size = 200 ", f"size = {hospital.hospital.declared_size} ")
    text = text.replace('path = "data.jsonl" ', f"{place} ")
    text = text.replace('name = "records" ', f"name = {quote(dataset)} ")
    if data.patient:
        text = text.replace('# patient = "patient_id"', f"patient = {quote(data.patient)}")
    text = text.replace('admission = "standing"', 'admission = "reviewed"')
    for key in ("max_epsilon", "max_delta"):
        text = re.sub(rf"(?m)^{key} = \S+", f"{key} = {quote(getattr(ceilings, key))}", text)
    start, _, rest = text.partition('state = "state" ')
    text = f"{start}{STATE}# gradient{rest.partition('# gradient')[2]}"
    return _as_read(text, hospital, dataset) + write_home(home, membership)


def _as_read(text: str, hospital: Hospital, dataset: str) -> str:
    """Add to the site file `text` the settings that say how the dataset is read (the keys READ_BY).
    They are copied from the site file of another membership that reads the dataset. If there is
    none, return `text` itself."""
    for each in hospital.memberships.values():
        try:
            tables = tomllib.loads(each.site.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        data = tables.get("data", {})
        if data.get("name", "records") != dataset:
            continue
        read_by = {key: data[key] for key in READ_BY if key in data}
        if PASSWORD_FILE in (options := read_by.get("options", {})):
            own = each.site.parent / options[PASSWORD_FILE]
            read_by["options"] = {**options, PASSWORD_FILE: own}
        columns = read_by.pop("columns", {})
        if hospital.datasets[dataset].patient:
            columns.pop("patient", None)  # `text` has it already, from hospital.toml
        lines = [f"{key} = {quote(value)}\n" for key, value in read_by.items()]
        text = text.replace("[data.columns]", "".join(lines) + "[data.columns]", 1)
        shape = "".join(f"{key} = {quote(value)}\n" for key, value in columns.items())
        return text.replace(COLUMNS, shape, 1)
    return text
