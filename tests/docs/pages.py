"""What is in a Markdown page, and whether it holds: links, and fenced blocks of code.

| python     | runs in an empty folder, and so do the doctests of what it defines      |
| toml       | a whole study or site file loads; of a part, every key is one of either |
| sh         | `fedtune`, `make`, `python -m`: each command, option and target exists; |
|            | of `pytest` and `tests.mutants.run` each test and each bug              |
| any other  | needs a comment right above that says why it is not run                 |

Errors: AssertionError, or whatever the block raises."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from fedtune.core.config import Site, Study, load_site, load_study
from fedtune.core.config.hospital import FILE as HOSPITAL
from fedtune.core.config.load import load_hospital
from tests.mutants.catalogue import MUTANTS
from tests.test_deploy_commands import parse

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
ELSEWHERE = ("https://", "http://", "mailto:")


@dataclass(frozen=True)
class Block:
    """A fenced block of code. why: the comment above it, for which it is not run."""

    line: int
    language: str
    text: str
    why: str


@dataclass(frozen=True)
class Page:
    """prose: the lines outside fences, without code."""

    prose: tuple[str, ...]
    blocks: tuple[Block, ...]


def read(text: str) -> Page:
    prose, blocks = [""], []
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        if line.startswith("```"):
            above = prose[-1] if NOT_RUN.fullmatch(prose[-1]) else ""
            inside = []
            for _, code in lines:
                if code == "```":
                    break
                inside.append(code)
            else:
                raise AssertionError(f"line {number}: a fence that is never closed")
            blocks.append(Block(number, line.strip("`"), "\n".join(inside) + "\n", above))
            prose.append("")
            continue
        hidden = line.startswith("    ") and line.strip() and not prose[-1].strip()
        assert not hidden, f"line {number}: an indented block, which nothing checks; use a fence"
        prose.append(line)
    return Page(tuple(prose), tuple(blocks))


def anchors(page: Page) -> set[str]:
    """The headings' names in a link, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for line in page.prose:
        if heading := re.fullmatch(r"#{1,6} (.+)", line):
            shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            found.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return found


def broken_links(path: Path) -> Iterator[str]:
    """Links of the page to a file that is not there, or to a heading that it does not have."""
    prose = "\n".join(read(path.read_text(encoding="utf-8")).prose)
    for target in LINK.findall(re.sub(r"`[^`]*`", "", prose)):
        if target.startswith(ELSEWHERE):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        there = file.exists()
        if there and anchor:
            there = anchor in anchors(read(file.read_text(encoding="utf-8")))
        if not there:
            yield target


def missing_files(path: Path) -> Iterator[str]:
    """Files of the code that the page names and that are not there: `x/y.py`, from the root or in
    fedtune/."""
    text = path.read_text(encoding="utf-8")
    for named in re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)+\.py)\b", text):
        if not any((ROOT / top / named).exists() for top in (".", "fedtune")):
            yield named


def run(block: Block, folder: Path) -> None:
    """Whether the block holds; `folder` is empty, and the current one."""
    if block.why:
        return
    match block.language:
        case "python":
            run_python(block.text)
        case "toml":
            load_toml(block.text, folder)
        case "sh":
            for words in commands(block.text):
                check_command(words)
        case other:
            raise AssertionError(f"a fence of {other or 'no language'}: say why it is not run")


def run_python(text: str) -> None:
    names: dict[str, object] = {"__name__": "documentation"}
    exec(compile(text, "documentation", "exec", dont_inherit=True), names)
    runner = doctest.DocTestRunner(verbose=False)
    for name, value in names.items():
        source = getattr(value, "__doc__", None)
        if getattr(value, "__module__", None) == "documentation" and source:
            runner.run(doctest.DocTestParser().get_doctest(source, names, name, None, None))
    assert not runner.failures, f"{runner.failures} examples of a docstring fail"


def load_toml(text: str, folder: Path) -> None:
    body = tomllib.loads(text)
    file = folder / "documentation.toml"
    file.write_text(text, encoding="utf-8")
    if {"study", "base", "training"} <= set(body):
        load_study(file)
    elif {"site", "data", "policy"} <= set(body):
        load_site(file)
    elif {"hospital", "datasets"} <= set(body):
        file.rename(folder / HOSPITAL)
        load_hospital(folder)
    else:
        wrong = [problems(kind, body) for kind in (Study, Site)]
        assert [] in wrong, f"none of study.toml, site.toml or hospital.toml: {wrong}"


def problems(kind: type[Study] | type[Site], body: dict[str, object]) -> list[str]:
    """What is wrong with a part of such a file, besides what it leaves out."""
    try:
        kind.model_validate(body, strict=False)
    except ValidationError as error:
        return [f"{e['loc']}: {e['msg']}" for e in error.errors() if e["type"] != "missing"]
    return []


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell's lines."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):  # not `VARIABLE=value command`
                words.append(word)


def check_command(words: list[str]) -> None:
    name = words[0].rsplit("/", 1)[-1]
    if name == "fedtune":
        parse([name, *words[1:]])
    elif name == "make":
        rules = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= rules, f"make knows no {' '.join(targets)}"
    elif name == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"no module {words[2]}"
        if words[2] == "pytest":
            for test in words[3:]:
                if ".py" in test:
                    check_test(test)
        elif words[2] == "tests.mutants.run":
            bugs = {word for before, word in pairwise(words) if before == "--only"}
            unknown = bugs - {mutant.name for mutant in MUTANTS}
            assert not unknown, f"no seeded bugs {unknown}"


def check_test(named: str) -> None:
    """Check that a test that a page names is there: a path, and the function after `::`."""
    file, _, function = named.partition("::")
    assert (ROOT / file).exists(), f"no file {file}"
    name = function.partition("[")[0]
    text = (ROOT / file).read_text(encoding="utf-8") if name else ""
    assert not name or f"def {name}(" in text, f"no test {named}"
