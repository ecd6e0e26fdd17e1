"""Measure what `fedtune data scan` finds and misses: recall by kind, and how much it takes wrongly.

    python -m benchmarks.scan --data DATA --out runs/scan

DATA holds fhir_bulk (13 invented patients, whose names and addresses are known) and mts_dialog. Two
sets: notes of the bulk export, in which each occurrence of the patient's own names and identifiers
must be found; and notes written here from templates, with every kind in a known place. Synthea puts
digits behind a name ("Ana269"), which no hospital does: measured as they are, and without digits.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedtune.core.data.scan import Scanner
from fedtune.core.data.scan_findings import Finding, choose

Truth = tuple[int, int, str]  # start, end, kind
GIVEN = "Ana Ben Chloe Dev Ewa Femi Grace Hiro Ines Jamal Kavya Liam Mei Nora Omar Priya"
FAMILY = "Abbott Brennan Castellanos Dubois Eriksen Farouk Goldberg Haddad Iyer Jansen Kowalski"
TOWNS = "Leeds Boston Manchester Springfield Cardiff Denver Bristol Portland"
STREETS = ["Elm Street", "Mill Road", "Station Lane", "Oak Avenue", "Harbour Drive", "King's Court"]
MONTHS = "January February March April May June July August September October November December"


def nhs(draw: random.Random) -> str:
    """A number with NHS's check digit (modulus 11)."""
    while True:
        digits = [draw.randrange(10) for _ in range(9)]
        check = 11 - sum(d * w for d, w in zip(digits, range(10, 1, -1), strict=True)) % 11
        if check != 10:
            text = "".join(map(str, [*digits, check % 11]))
            return f"{text[:3]} {text[3:6]} {text[6:]}"


def generated(number: int, seed: int = 0) -> Iterator[tuple[str, list[Truth]]]:
    """Write notes with identifiers in known places."""
    draw = random.Random(seed)
    for _ in range(number):
        day, month, year = draw.randrange(1, 29), draw.randrange(12), draw.randrange(1950, 2025)
        month_name = MONTHS.split()[month]
        dates = [f"{year}-{month + 1:02}-{day:02}", f"{day:02}/{month + 1:02}/{year}",
                 f"{day} {month_name} {year}", f"{month_name} {day}, {year}"]  # fmt: skip
        area = draw.randrange(201, 660)
        name = f"{draw.choice(GIVEN.split())} {draw.choice(FAMILY.split())}"
        parts: list[str | tuple[str, str]] = [
            draw.choice(["Seen in clinic: ", "Patient ", "I reviewed ", "Ward round. "]),
            ("name", name),
            draw.choice([", MRN ", ", medical record number "]),
            ("mrn", str(draw.randrange(10**6, 10**8))),
            ", NHS number ", ("nhs_number", nhs(draw)),
            ". Lives at ", ("address", f"{draw.randrange(1, 300)} {draw.choice(STREETS)}"),
            ", ", ("place", draw.choice(TOWNS.split())),
            ". Blood pressure 142/88, potassium 4.1, glucose 7.9 mmol/l, heart rate 88. ",
            "Started amlodipine 5 mg daily on ", ("date", draw.choice(dates)),
            draw.choice([". Call ", ". Daughter can be reached on "]),
            ("phone", f"{area}-{draw.randrange(201, 990)}-{draw.randrange(1000, 9999)}"),
            " or ", ("email", f"{name.split()[0].lower()}.{draw.randrange(99)}@example.org"),
            ". SSN ",
            ("us_ssn", f"{area - 100}-{draw.randrange(10, 99)}-{draw.randrange(1001, 9999)}"),
            f". He is {draw.randrange(20, 80)} years old; the mother died at ",
            ("age", f"{draw.randrange(90, 104)} years"),
            ". Discussed with Dr ",
            ("name", draw.choice(FAMILY.split())),
            ". Follow-up in 6 weeks.",
        ]  # fmt: skip
        text, truth = "", list[Truth]()
        for part in parts:
            if isinstance(part, tuple):
                truth.append((len(text), len(text) + len(part[1]), part[0]))
                part = part[1]
            text += part
        yield text, truth


def exported(folder: Path, digits: bool) -> Iterator[tuple[str, list[Truth]]]:
    """Read notes, with each occurrence of their patient's names, address and identifiers."""
    patients = {}
    for line in (folder / "Patient.000.ndjson").read_text().splitlines():
        patient = json.loads(line)
        kinds: dict[str, str] = {}
        for name in patient["name"]:
            for part in (*name["given"], name["family"]):
                kinds[part if digits else re.sub(r"\d", "", part)] = "name"
        for address in patient["address"]:
            kinds |= {address["city"]: "place", address["line"][0]: "address"}
        kinds[patient["birthDate"]] = "date"
        patients[patient["id"]] = kinds
    seen = set()
    for line in (folder / "DocumentReference.000.ndjson").read_text().splitlines():
        note = json.loads(line)
        text = base64.b64decode(note["content"][0]["attachment"]["data"]).decode()
        if not digits:
            text = re.sub(r"\b([A-Z][a-zé']+)\d{1,3}\b", r"\1", text)
        kinds = patients[note["subject"]["reference"].removeprefix("Patient/")]
        truth = [
            (m.start(), m.end(), kind)
            for word, kind in kinds.items()
            for m in re.finditer(rf"\b{re.escape(word)}\b", text)
        ]
        truth += [(*m.span(), "date") for m in re.finditer(r"\b\d{4}-\d\d-\d\d\b", text)]
        if text not in seen:
            seen.add(text)
            yield text, truth


def measure(
    scanner: Scanner, notes: Iterator[tuple[str, list[Truth]]], most: int
) -> dict[str, object]:
    """Count truths that a finding of any kind covers, and findings that cover no truth.

    A truth counts as found where no character of it stays: its kind may be another one."""
    found, there = Counter[str](), Counter[str]()
    wrong, right, characters, began, number = Counter[str](), 0, 0, time.monotonic(), 0
    for number, (text, truth) in enumerate(notes, 1):
        findings = choose(scanner([text])[0])
        for start, end, kind in truth:
            there[kind] += 1
            found[kind] += _covered(text, start, end, findings)
        for finding in findings:
            hit = any(finding.start < end and start < finding.end for start, end, _ in truth)
            right += hit
            wrong[finding.kind] += not hit
        characters += len(text)
        if number == most:
            break
    seconds = time.monotonic() - began
    return {
        "notes": number,
        "recall": {kind: f"{found[kind]} of {there[kind]}" for kind in sorted(there)},
        "precision": f"{right} of {right + wrong.total()}",
        "taken wrongly": dict(wrong.most_common()),
        "ms a note": round(1000 * seconds / number, 1),
        "characters a note": characters // number,
    }


def _covered(text: str, start: int, end: int, findings: list[Finding]) -> bool:
    left = set(range(start, end))
    for finding in findings:
        left -= set(range(finding.start, finding.end))
    return not any(text[at].isalnum() for at in left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--notes", type=int, default=300, help="at most so many of each set")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, notes in {
        "generated": generated(args.notes),
        "fhir_bulk": exported(args.data / "fhir_bulk", digits=True),
        "fhir_bulk, names without digits": exported(args.data / "fhir_bulk", digits=False),
    }.items():
        with Scanner() as scanner:
            results[name] = measure(scanner, notes, args.notes)
        print(name, json.dumps(results[name], indent=1), flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
