"""A hospital's home with two memberships or three over the same notes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedtune.core.config import Site, load_site
from fedtune.public.start import Start
from tests.client.site_kit import begun, notes

NAMES = ("cardio", "onco")  # the memberships of a home, unless more shares are asked for
THIRD = "neuro"
HOSPITAL = """
[hospital]
name = "north"
declared_size = 12
[policy]
max_epsilon = {ceiling}
max_fallback_epsilon = 20.0
max_delta = 1e-4
[datasets.records]
path = "notes.jsonl"
patient = "who"
"""
MEMBERSHIP = """
[memberships.{name}]
site = "{name}/site.toml"
max_epsilon = {share}
"""
SITE = """
[site]
name = "{name}-north"
declared_size = 12
[hospital]
home = ".."
membership = "{name}"
[data]
path = "../notes.jsonl"
columns = {{ prompt = "note", completion = "answer", patient = "who" }}
[policy]
bases = "any"
"""


def make_hospital(
    home: Path, *, ceiling: float = 8.0, shares: Sequence[float] = (8.0, 8.0)
) -> dict[str, Path]:
    """Lay out a home with a membership for each share, and return their site files."""
    notes(home)
    parts = [HOSPITAL.format(ceiling=ceiling)]
    files = {}
    for name, share in zip((*NAMES, THIRD), shares, strict=False):
        parts.append(MEMBERSHIP.format(name=name, share=share))
        files[name] = home / name / "site.toml"
        files[name].parent.mkdir()
        files[name].write_text(SITE.format(name=name))
    (home / "hospital.toml").write_text("".join(parts))
    return files


def load(home: Path, **given: object) -> dict[str, Site]:
    return {name: load_site(path) for name, path in make_hospital(home, **given).items()}  # type: ignore[arg-type]


def make_apart(home: Path) -> dict[str, Path]:
    """Lay out a home of which cardio trains on "records" and onco on "clinic", which are declared
    disjoint though "p-both" is in both."""
    files = make_hospital(home)
    rows = [json.loads(line) for line in (home / "notes.jsonl").read_text().splitlines()]
    elsewhere = [{**row, "who": f"clinic-{row['who']}"} for row in rows]
    both = [{**rows[0], "who": "p-both"}]
    for name, kept in (("notes", rows), ("clinic", elsewhere)):
        text = "".join(json.dumps(row) + "\n" for row in [*kept, *both])
        (home / f"{name}.jsonl").write_text(text)
    hospital = home / "hospital.toml"
    apart = (
        'disjoint_from = ["clinic"]\n[datasets.clinic]\npath = "clinic.jsonl"\npatient = "who"\n'
    )
    at = 'path = "notes.jsonl"\npatient = "who"\n'
    hospital.write_text(hospital.read_text().replace(at, at + apart))
    own = 'name = "clinic"\npath = "../clinic.jsonl"'
    text = files["onco"].read_text().replace('path = "../notes.jsonl"', own)
    files["onco"].write_text(text)
    return files


def study_of(name: str, base: Path, epsilon: float = 4.0, max_grad_norm: float = 1.0) -> Start:
    """Return a consortium's study of its own."""
    privacy = {"epsilon": epsilon, "delta": 1e-4, "unit": "patient"}
    clipping = {"max_grad_norm": max_grad_norm}
    return begun(base, study={"name": name}, privacy=privacy, clipping=clipping)
