"""The page for patients is plain enough to be read, and its odds are those of such a study."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

import fedtune
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "for-patients.md"
# The noisy steps of `init --task classify --size 350`.
PLANNED = ("privacy.delta=1e-4", "training.rounds=20", "training.sampling_rate=1.0")


def sentences(text: str) -> str:
    """What is read as prose: without tables, marks, and the places of links."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    plain = "\n".join(re.sub(r"^(#+|\*|\d+\.) ", "", line) for line in lines)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", re.sub(r"[*_`]", "", plain))


def hard(text: str) -> list[str]:
    """Why the text is too hard for a reader of 14, who is in the eighth grade at most.

    SMOG and Flesch-Kincaid are grades; Dale and Chall's score is below 7 up to the eighth."""
    textstat = pytest.importorskip("textstat", reason="textstat is in the docs extra")
    scores = {
        "SMOG": (textstat.smog_index(text), 9),
        "Flesch-Kincaid": (textstat.flesch_kincaid_grade(text), 9),
        "Dale-Chall": (textstat.dale_chall_readability_score(text), 7),
    }
    return [f"{name}: {score}" for name, (score, limit) in scores.items() if score >= limit]


def odds(text: str) -> dict[float, int]:
    """The page's table: ε -> how many of 100 guesses are right."""
    rows = re.findall(r"^\| ([\d.]+) \| (\d+) \| 50 \|$", text, re.MULTILINE)
    return {float(epsilon): int(right) for epsilon, right in rows}


def wrong_odds(shown: dict[float, int], folder: Path) -> list[float]:
    """Each ε whose odds are not what `fedtune plan` shows, rounded up."""
    study_file, _ = fedtune.init(folder)

    def right(epsilon: float) -> int:
        study = fedtune.load_study(study_file, settings=(*PLANNED, f"privacy.epsilon={epsilon}"))
        return math.ceil(100 * fedtune.plan(study, [350]).sites[0].risk)

    return [epsilon for epsilon, count in shown.items() if right(epsilon) != count]


def test_a_reader_of_14_can_read_it() -> None:
    assert hard(sentences(PAGE.read_text(encoding="utf-8"))) == []


def test_twin_a_page_for_engineers_is_too_hard() -> None:
    text = sentences((ROOT / "docs" / "guarantee.md").read_text(encoding="utf-8"))
    assert hard(text) != []


def test_it_is_two_pages() -> None:
    assert len(sentences(PAGE.read_text(encoding="utf-8")).split()) <= 1000


def test_its_odds_are_those_of_a_plan(tmp_path: Path) -> None:
    shown = odds(PAGE.read_text(encoding="utf-8"))
    assert set(shown) == {1, 3, 4.9, 8}
    assert wrong_odds(shown, tmp_path / "study") == []


def test_twin_odds_that_sound_better_are_found(tmp_path: Path) -> None:
    assert wrong_odds({3.0: 66, 4.9: 70}, tmp_path / "study") == [4.9]
