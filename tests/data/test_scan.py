"""The scan for identifiers: what it finds, what it leaves, and what becomes of a record."""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fedtune.core.bases import wheel
from fedtune.core.config import Columns, SiteData, Study, load_site
from fedtune.core.config.scan import KINDS, ScanTable
from fedtune.core.data import load, scan, scan_engine
from fedtune.core.data.children import ChildFailed
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.load import load_dataset
from fedtune.core.data.records import Record
from fedtune.core.data.scan import FOUND, TOO_LONG, UNSCANNED, RecordScan, Scanner
from fedtune.core.data.scan_findings import Finding, choose, pack, redact, unpack
from fedtune.core.errors import InfrastructureError, ModelError
from fedtune.officer import data_scan
from fedtune.officer.before_joining import check_before_joining
from tests.cli_kit import run

WORDS = [
    *("the", "patient", "ssn", "is", "123-45-6789", "and", "nhs", "number", "943 476 5919", "ip"),
    *("10.0.0.1", "::", "social", "security", "078-05-1120", "phone", "555-123-4567", "seen", "on"),
    *("3 May", "by", "Dr Smith", "in", "Boston."),
]


def spaced(length: int) -> str:
    """Return a text of so many characters, of words of one letter."""
    return ("x " * length)[: length - 1] + "x"


installed = pytest.mark.skipif(
    scan_engine.name_missing_package() != "",
    reason=f"needs fedtune[scan]: no {scan_engine.name_missing_package()}",
)
TEXTS = {
    "name": "Seen by Dr Adeyemi this morning.",
    "place": "She moved here from Manchester last spring.",
    "address": "Lives at 14 Station Lane with her son.",
    "postcode": "The referral came from LS1 4AP, as before.",
    "date": "Admitted on 4 March 2021 with chest pain.",
    "age": "A 93-year-old man with a fall.",
    "phone": "Call her son on 617-555-0142.",
    "email": "Results to a.lee@example.org, please.",
    "us_ssn": "Social security number 536-90-4399.",
    "mrn": "MRN: 4471902, room 4.",
    "nhs_number": "NHS 943 476 5919 on the label.",
    "health_plan": "Member ID: ABC1234567 is on file.",
    "account": "Account number 99812345 was billed.",
    "licence": "Licence no. 4471902B was shown.",
    "vehicle": "VIN 1HGCM82633A004352 was towed.",
    "device": "Serial number PM88213X, a pacemaker.",
    "url": "See https://example.org/p/881 for it.",
    "ip": "The portal was opened from 203.0.113.7.",
    "uuid": "Reference 129c6ac7-8d06-89de-ad63-0204a93e76c3.",
}
CLINICAL = (
    "Blood pressure 142/88, heart rate 88, temperature 37.2, potassium 4.1 mmol/l. Amlodipine 5 mg "
    "daily for 6 weeks, then 10 mg. He is 59 years old and may need a scan. ICD-10 E11.9, LOINC "
    "718-7. Ejection fraction 55-60%. Follow-up in 3 months."
)
COLLIDING = ("Okonkwowicz", "ngYJRNqDvKBnOEwy")  # of one 64-bit hash of spaCy's strings
PLANTED = "Dr Adeyemi rang 617-555-0142 on 4 March 2021."
SITE = """
[site]
name = "north"
declared_size = 10
[data]
path = "notes.jsonl"
[data.columns]
prompt = "q"
completion = "a"
patient = "who"
[data.scan]
action = "leave_out"
"""
KEPT = "Cough for three days, no fever."


@pytest.fixture(scope="module")
def analyser() -> Any:
    """presidio in this process, as the program that forks the children builds it."""
    return scan_engine.make(scan_engine.model_folder())


@pytest.fixture(scope="module")
def scanner() -> Iterator[Scanner]:
    with Scanner() as started:
        yield started


@pytest.fixture
def started(scanner: Scanner, monkeypatch: pytest.MonkeyPatch) -> Scanner:
    """The module's scanner, for each table [data.scan]: a start takes five seconds of a core."""
    monkeypatch.setattr(scan, "Scanner", lambda *_: nullcontext(scanner))
    return scanner


class Stand:
    """Stands in for a Scanner that is started. find: what it finds in a text."""

    def __init__(self, find: Callable[[str], list[Finding]]) -> None:
        self.find = find

    def __call__(self, texts: Sequence[str]) -> list[list[Finding]]:
        return [self.find(text) for text in texts]


def redacted(analyser: Any, text: str) -> str:
    return redact(text, [f for f in scan_engine.find(analyser, text) if f.score >= 0.35])


# ------------------------------------------------------------------------- what is found


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_and_redacted(kind: str, analyser: Any) -> None:
    text = TEXTS[kind]
    hits = [f for f in scan_engine.find(analyser, text) if f.kind == kind and f.score >= 0.35]
    (finding,) = choose(hits)
    without = redact(text, hits)
    assert f"[{kind}]" in without and text[finding.start : finding.end] not in without


@installed
def test_clinical_numbers_are_no_identifiers(scanner: Scanner) -> None:
    assert scanner([CLINICAL]) == [[]]


@installed
def test_a_number_without_its_check_digit_is_none(analyser: Any) -> None:
    found = scan_engine.find(analyser, "NHS 943 476 5918 on the label.")
    assert "nhs_number" not in {finding.kind for finding in found}


@installed
def test_a_word_of_another_text_that_has_the_same_hash_changes_nothing(analyser: Any) -> None:
    """tests/mutants has the twin, in which the words of one text stay for the next."""
    from spacy.strings import hash_string

    word, made = COLLIDING
    assert hash_string(word) == hash_string(made)
    text = f"Seen with {word} at the ward. Mary Smith, her sister, called from Leeds."
    alone = redacted(analyser, text)
    assert "[name]" in alone and "Mary" not in alone
    another = scan_engine.make(scan_engine.model_folder())
    redacted(another, f"Reviewed {made} today, no change.")
    assert redacted(another, text) == alone


@installed
def test_a_text_on_which_the_analysis_stops_leaves_nothing(
    analyser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    word, made = COLLIDING
    text = f"Seen with {word} at the ward. Mary Smith, her sister, called from Leeds."
    alone, honest = redacted(analyser, text), analyser.analyze

    def stops(text: str, **given: Any) -> Any:
        found = honest(text, **given)
        if made in text:
            raise MemoryError
        return found

    monkeypatch.setattr(analyser, "analyze", stops)
    with pytest.raises(MemoryError):
        redacted(analyser, f"Reviewed {made} today, no change.")
    assert redacted(analyser, text) == alone


def test_overlapping_findings_go_as_a_whole() -> None:
    found = [
        Finding("name", 2, 6, 0.6),
        Finding("address", 4, 9, 0.9),
        Finding("date", 11, 12, 0.2),
    ]
    assert redact("0123456789abcdef", found[:2]) == "01[address]9abcdef"
    assert choose(found[:2]) == [found[1]]
    assert redact("0123456789abcdef", found) == "01[address]9a[date]cdef"


def test_what_is_chosen_is_what_comparing_all_with_all_chooses() -> None:
    draw = random.Random(0)
    for _ in range(200):
        starts = [draw.randrange(40) for _ in range(12)]
        found = [
            Finding(draw.choice(("name", "date")), at, at + draw.randint(1, 6), draw.random())
            for at in starts
        ]
        best = list[Finding]()
        for hit in sorted(found, key=lambda f: (-f.score, f.start - f.end, f.start)):
            if all(hit.end <= other.start or hit.start >= other.end for other in best):
                best.append(hit)
        assert choose(found) == sorted(best, key=lambda f: f.start)


def test_many_findings_take_no_more_than_their_number() -> None:
    found = [Finding("ip", 3 * n, 3 * n + 2, 0.9) for n in range(8000)]
    began = time.process_time()
    assert redact("ab " * 8000, found) == "[ip] " * 8000
    assert time.process_time() - began < 1  # all with all: 9 s


def test_the_threshold_and_the_kinds_are_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("name", 0, 2, 0.4), Finding("date", 3, 5, 0.9), Finding("date", 3, 6, 0.2)]
    scanner = Scanner(("date",), 0.5)
    monkeypatch.setattr(scanner, "_find", lambda texts: [found for _ in texts])
    assert scanner(["abcdefg"]) == [[found[1]]]


# ------------------------------------------------------------------------- the child


def test_what_a_child_answers_is_read_as_findings_in_its_text() -> None:
    found = [Finding("name", 0, 4, 0.9), Finding("date", 2, 3, 0.1)]
    assert unpack(pack(found), 4) == found
    for wrong in (
        b"{}", b"[1]", b'[["name", 0, 4]]', b'[["name", 0, 5, 0.9]]', b'[["name", -1, 4, 0.9]]',
        b'[["name", 3, 3, 0.9]]', b'[["name", true, 4, 0.9]]', b'[["name", 0, 4, NaN]]',
        b'[["nobody", 0, 4, 0.9]]', b'[[["name"], 0, 4, 0.9]]', b"[[[[", b"",
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError)):
            unpack(wrong, 4)


@installed
def test_a_child_finds_what_this_process_finds(scanner: Scanner, analyser: Any) -> None:
    texts = [*TEXTS.values(), *TEXTS.values(), CLINICAL, PLANTED, "", "\n"]
    here = [[f for f in scan_engine.find(analyser, text) if f.score >= 0.35] for text in texts]
    assert scanner(texts) == here


@installed
def test_a_text_that_takes_too_long_costs_its_own_unit_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The text takes some six seconds of a core; tests/mutants has the twin without a limit."""
    monkeypatch.setattr(scan, "CPU_SECONDS", 2)
    slow, quick = ":: " * (scan.MOST // 3 - 9), Record(unit="b", prompt=PLANTED, completion="yes")
    units = [[quick], [Record(unit="a", prompt=slow, completion="yes"), quick], [quick]]
    with scan.scanning(ScanTable(action="redact")) as applied:
        assert applied is not None
        one, two, three = ([getattr(r, "prompt", r) for r in applied(unit)] for unit in units)
    assert two == [UNSCANNED, UNSCANNED]
    assert one == three and "Adeyemi" not in one[0] and "[name]" in one[0]


@installed
def test_children_are_as_many_as_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()
    honest = scan.Children.run

    def run(self: Any, inputs: Sequence[bytes], *rest: Any, **options: Any) -> Any:
        given.append(len(inputs))
        return honest(self, inputs, *rest, **options)

    monkeypatch.setattr(scan.Children, "run", run)
    for texts in ([PLANTED], [PLANTED, KEPT, CLINICAL]):
        given.clear()
        with scan.scanning(ScanTable(action="redact"), 8) as applied:
            assert applied is not None
            for text in texts:
                applied([Record(unit="a", prompt=text, completion="yes")])
        assert len(given) == 10  # of eight units and a quarter


@installed
def test_a_text_costs_each_unit_the_same(scanner: Scanner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that has the same text as one before must not end sooner, and so in time."""
    given = list[list[bytes]]()
    honest = scan.Children.run

    def run(self: Any, inputs: Sequence[bytes], *rest: Any) -> Any:
        given.append([*inputs])
        return honest(self, inputs, *rest)

    monkeypatch.setattr(scan.Children, "run", run)
    texts = [PLANTED, KEPT, PLANTED, ""]
    assert scanner(texts) == scanner(texts)
    assert given == [[PLANTED.encode(), KEPT.encode()]] * 2


@pytest.mark.parametrize("redacts", [True, False])
def test_a_record_that_is_too_long_is_left_out_unscanned_and_alone(redacts: bool) -> None:
    lengths = list[int]()
    applied = RecordScan(Stand(lambda text: lengths.append(len(text)) or []), redacts)  # type: ignore
    texts = {  # beside "yes"
        "a": spaced(scan.MOST - 2),
        "b": KEPT,
        "c": spaced(scan.MOST - 3),
        "d": "x" * (scan.WORD + 1),
        "e": "x" * scan.WORD,
    }
    records = [Record(unit=k, prompt=text, completion="yes") for k, text in texts.items()]
    read = [one if isinstance(one, str) else one.prompt for one in applied(records)]
    assert read == [TOO_LONG, texts["b"], texts["c"], TOO_LONG, texts["e"]]
    assert scan.WORD in lengths and scan.WORD + 1 not in lengths
    assert max(lengths) == scan.MOST - 3


@installed
def test_no_pattern_is_given_up_by_the_clock(
    analyser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """presidio goes on without a pattern that took too long on a busy machine."""

    class Slow:
        def __init__(self, real: Any) -> None:
            self.real = real

        def finditer(self, text: str, timeout: float | None = None) -> Any:
            if timeout is not None:
                raise TimeoutError
            return self.real.finditer(text)

    assert scan_engine.find(analyser, TEXTS["mrn"])  # every pattern is compiled
    for recogniser in analyser.registry.recognizers:
        for pattern in getattr(recogniser, "patterns", ()):
            monkeypatch.setattr(pattern, "compiled_regex", Slow(pattern.compiled_regex))
    for kind in {*KINDS} - {"place"}:
        assert kind in {finding.kind for finding in scan_engine.find(analyser, TEXTS[kind])}


@installed
def test_no_text_and_no_lookup_leaves_the_machine(
    analyser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """presidio's own recogniser of e-mail addresses fetches a list from the internet."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert all(scan_engine.find(analyser, text) for text in TEXTS.values())


@installed
def test_context_is_looked_for_near_a_find_and_gives_what_presidio_gives(
    analyser: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work does not grow with the square of a text. Twin: presidio's own enhancer is given all
    words of the text for each find, as a list."""
    from presidio_analyzer.context_aware_enhancers import LemmaContextAwareEnhancer

    from fedtune.core.data import scan_context

    draw = random.Random(11)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 90))) for _ in range(12)]
    texts.append("word " * 300 + "ssn 078-05-1120 " + ":: " * 300)
    given = list[tuple[int, type]]()
    honest = LemmaContextAwareEnhancer._add_n_words

    def add_n_words(index: int, n: int, lemmas: Any, keywords: Any, back: bool) -> list[str]:
        given.append((len(lemmas), type(keywords)))
        return honest(index, n, lemmas, keywords, back)

    monkeypatch.setattr(LemmaContextAwareEnhancer, "_add_n_words", staticmethod(add_n_words))

    def found(enhancer: LemmaContextAwareEnhancer) -> list[list[Finding]]:
        given.clear()
        monkeypatch.setattr(analyser, "context_aware_enhancer", enhancer)
        return [scan_engine.find(analyser, text) for text in texts]

    assert isinstance(analyser.context_aware_enhancer, scan_context.NearContext)
    ours = found(scan_context.NearContext())
    assert given and {kind for _, kind in given} == {frozenset}
    assert max(size for size, _ in given) <= 2 * scan_context.NEAR + 1
    assert ours == found(LemmaContextAwareEnhancer())
    assert {kind for _, kind in given} == {list} and max(size for size, _ in given) > 600


@pytest.mark.parametrize("length", [20_000])
def test_a_long_text_takes_no_more_than_seconds(length: int) -> None:
    """Each pattern alone, on text that it nearly matches: its work grows with the length."""
    import regex

    for kind, patterns in scan_engine.PATTERNS.items():
        for pattern in patterns:
            for near in ("A " * (length // 2), "9" * length, "Ab " * (length // 3), "1-" * length):
                began = time.process_time()
                list(regex.finditer(pattern, near))
                assert time.process_time() - began < 5, (kind, pattern)


# ------------------------------------------------------------------------- in training


def data(
    path: Path, action: str | None, study: Study, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    table = ScanTable(action=action) if action else None  # type: ignore[arg-type]
    file = SiteData(
        path=path, columns=Columns(prompt="q", completion="a", patient="who"), scan=table
    )
    return load_dataset(file, study, tokenizer, strict=False)


def rows(texts: dict[str, str]) -> list[dict[str, str]]:
    return [{"who": who, "q": text, "a": "yes"} for who, text in texts.items()]


def texts_in(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(example.input_ids) for example in dataset.examples]


@installed
@pytest.mark.parametrize("action", [None, "warn", "redact", "leave_out"])
def test_what_trains(
    action: str | None,
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    path = jsonl(*rows({"a": PLANTED, "b": KEPT, "c": KEPT + " No pain."}))
    plan = study({"unit": "patient"})
    read = data(path, action, plan, tokenizer)
    said = " ".join(texts_in(read, tokenizer))
    assert KEPT in said
    assert ("Adeyemi" in said) == (action in (None, "warn"))
    assert ("[name]" in said) == (action == "redact")
    assert read.rejected[FOUND] == (action == "leave_out")
    assert read.n_units == (2 if action == "leave_out" else 3)


@installed
@pytest.mark.parametrize("action", ["redact", "leave_out"])
def test_one_record_more_changes_none_of_the_others(
    action: str,
    started: Scanner,
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    others, plan = {"b": KEPT, "c": TEXTS["mrn"], "d": TEXTS["name"]}, study({"unit": "patient"})
    without = data(jsonl(*rows(others)), action, plan, tokenizer)
    for number, text in enumerate((PLANTED, KEPT, "Adeyemi Adeyemi", "", "\x00", "a" * 9000)):
        path = jsonl(*rows({"a": text} | others), name=f"{number}.jsonl")
        read = data(path, action, plan, tokenizer)
        assert texts_in(read, tokenizer)[-len(without.examples) :] == texts_in(without, tokenizer)


def test_a_unit_on_which_the_scan_fails_is_left_out_alone(
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = jsonl(*rows({"a": PLANTED, "b": KEPT, "c": KEPT}))
    for error, reason in ((ChildFailed(), UNSCANNED), (ValueError(PLANTED), "cannot be read")):

        def fails(text: str, error: Exception = error) -> list[Finding]:
            if "Adeyemi" in text:
                raise error
            return []

        monkeypatch.setattr(scan, "Scanner", lambda *_, fails=fails: nullcontext(Stand(fails)))
        read = data(path, "redact", study({"unit": "patient"}), tokenizer)
        assert read.n_units == 2 and read.rejected[reason] == 1


@installed
def test_a_text_that_is_no_unicode_is_rejected_alone(
    started: Scanner,
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    path = jsonl(*rows({"b": KEPT}))
    half = '{"who": "%s", "q": "Seen \\ud800 today", "a": "yes"}'
    path.write_text("\n".join([path.read_text().strip(), half % "a", half % "b"]))
    read = data(path, "redact", study({"unit": "patient"}), tokenizer)
    assert read.n_units == 1 and KEPT in " ".join(texts_in(read, tokenizer))


def test_without_the_package_nothing_trains_unscanned(
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    path = jsonl(*rows({"a": PLANTED, "b": KEPT}))
    with pytest.raises(ModelError, match=r"fedtune\[scan\]"):
        data(path, "redact", study({"unit": "patient"}), tokenizer)
    assert data(path, "warn", study({"unit": "patient"}), tokenizer).n_units == 2


@installed
def test_another_model_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))

    def download(name: str, version: str, into: Path, *options: str) -> Path:
        into.joinpath("other.whl").write_bytes(b"other")
        return into / "other.whl"

    monkeypatch.setattr(scan_engine, "download", download)
    with pytest.raises(ModelError, match="its sha256 is"):
        scan_engine.model_folder()
    assert list((tmp_path / "scan").iterdir()) == []
    kept = tmp_path / "scan" / scan_engine.FILE
    kept.write_bytes(b"changed afterwards")
    with pytest.raises(ModelError, match="its sha256 is"):
        scan_engine.model_folder()
    assert wheel.verify  # the same check as of a base


@installed
def test_a_reading_writes_nothing_once_the_model_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free space may follow from records. A file that was changed is unpacked again."""
    kept = scan_engine.model_folder().parent / scan_engine.FILE
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / scan_engine.FILE).write_bytes(kept.read_bytes())
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    folder = scan_engine.model_folder()
    config, honest = folder / "config.cfg", (folder / "config.cfg").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def takes_a_lock(*_: Any) -> None:
        raise AssertionError("a lock is taken")

    with monkeypatch.context() as patch:
        patch.setattr(scan_engine.locks, "hold", takes_a_lock)
        assert scan_engine.model_folder() == folder
    with monkeypatch.context() as patch:
        patch.setattr(scan_engine.zipfile.ZipFile, "extract", full)
        config.write_bytes(honest + b"#")
        with pytest.raises(InfrastructureError, match="No space left"):
            scan_engine.model_folder()
    (folder / "more").write_bytes(b"x")
    assert scan_engine.model_folder() == folder
    assert config.read_bytes() == honest and not (folder / "more").exists()
    assert {each.name for each in folder.parent.iterdir()} == {
        "model", "model.lock", scan_engine.FILE,
    }  # fmt: skip


@installed
def test_processes_that_unpack_at_once_leave_each_other_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a process left that was killed at it is removed."""
    kept = scan_engine.model_folder().parent / scan_engine.FILE
    (tmp_path / "scan" / ".model").mkdir(parents=True)
    (tmp_path / "scan" / scan_engine.FILE).write_bytes(kept.read_bytes())
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    made = list[Path]()
    honest = scan_engine._unpack

    def unpack(archive: Any, members: Any, folder: Path) -> None:
        made.append(folder)
        honest(archive, members, folder)

    monkeypatch.setattr(scan_engine, "_unpack", unpack)
    with ThreadPoolExecutor(3) as pool:
        folders = [pool.submit(scan_engine.model_folder) for _ in range(3)]
        assert len({each.result() for each in folders}) == 1 == len(made)
    assert not (tmp_path / "scan" / ".model").exists()


@installed
def test_the_scan_starts_before_a_record_is_read(
    jsonl: Callable[..., Path],
    study: Callable[..., Study],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> Path:
        raise InfrastructureError("no space")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("a record was read")

    monkeypatch.setattr(scan_engine, "model_folder", fails)
    monkeypatch.setattr(load, "read_file", read)
    path = jsonl(*rows({"a": PLANTED, "b": KEPT}))
    with pytest.raises(InfrastructureError, match="no space"):
        data(path, "redact", study({"unit": "patient"}), tokenizer)


@pytest.mark.parametrize("action", ["redact", "leave_out", "warn"])
def test_a_site_joins_with_the_model_in_its_cache_or_not_at_all(
    action: str,
    jsonl: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first reading comes when it has joined, in a process without a network."""
    jsonl(*rows({"a": KEPT, "b": KEPT, "c": KEPT}), name="notes.jsonl")
    (tmp_path / "site.toml").write_text(SITE.replace("leave_out", action))
    site = load_site(tmp_path / "site.toml")

    def fails() -> Path:
        raise ModelError("the model is missing")

    monkeypatch.setattr(scan_engine, "model_folder", fails)
    with nullcontext() if action == "warn" else pytest.raises(ModelError, match="is missing"):
        check_before_joining(site)


def test_every_kind_has_its_paragraph() -> None:
    assert set(KINDS.values()) == set("ABCDFGHIJKLMNOR")  # (E) is a phone's; (P), (Q) are no text
    assert {*scan_engine.PATTERNS} <= {*KINDS}
    assert {*TEXTS} == {*KINDS}
    assert json.dumps(KINDS)


# ------------------------------------------------------------------------- the command


@installed
def test_the_command_counts_and_shows_no_text(
    jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(*rows({"a": PLANTED, "b": KEPT, "c": TEXTS["mrn"]}), name="notes.jsonl")
    (tmp_path / "site.toml").write_text(SITE)
    shown = run("data", "scan", "site.toml", "--rows")
    assert shown.exit_code == 0, shown.output
    assert "2 of 3 records hold" in shown.output and "leaves these records out" in shown.output
    assert "notes.jsonl, row 1: " in shown.output and "row 2" not in shown.output
    told = run("data", "scan", "site.toml", "--json")
    found = json.loads(told.stdout)
    assert found["findings"] == {"name": 1, "phone": 1, "date": 1, "mrn": 1}
    for text in (shown.output, told.stdout):
        for secret in ("Adeyemi", "0142", "4471902", "March"):
            assert secret not in text


def test_the_command_counts_what_it_cannot_scan_and_goes_on(
    jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(text: str) -> list[Finding]:
        assert len(text) <= scan.MOST
        if "Adeyemi" in text:
            raise ChildFailed
        return [Finding("mrn", 0, 3, 0.9)] if "MRN" in text else []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_scan, "Scanner", lambda *_: nullcontext(Stand(fails)))
    texts = {"a": PLANTED, "b": spaced(scan.MOST), "c": KEPT, "d": TEXTS["mrn"]}
    jsonl(*rows(texts), name="notes.jsonl")
    (tmp_path / "site.toml").write_text(SITE)
    shown = run("data", "scan", "site.toml", "--rows")
    assert shown.exit_code == 0, shown.output
    assert "2 rows cannot be read or scanned" in shown.output and "row 4: mrn 1" in shown.output
    assert "Adeyemi" not in shown.output + shown.stderr
    told = run("data", "scan", "site.toml", "--json")
    assert json.loads(told.stdout)["failed"] == 2 and "Adeyemi" not in told.stderr


def test_the_command_says_what_to_install(
    jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "spacy", None)
    jsonl(*rows({"a": PLANTED}), name="notes.jsonl")
    (tmp_path / "site.toml").write_text(SITE)
    shown = run("data", "scan", "site.toml")
    assert shown.exit_code == 2 and "pip install 'fedtune[scan]'" in shown.stderr
