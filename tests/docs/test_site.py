"""The documentation site is built offline from the pages as they lie, and asks no other host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import LINK, ROOT
from tests.docs.site import build

# Tags of which a browser fetches the address by itself; that of <a> it fetches on a click.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio|link(?![^>]*rel=[\"']?(?:canonical|next|prev)))"
    r"[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)
IMPORTED = re.compile(r"(?:url\([\"']?|@import [\"']?)((?:https?:)?//[^\"')\s]+)")


def requests(site: Path) -> Iterator[str]:
    """Addresses at other hosts that a page or a style of the site fetches."""
    for kind, pattern in (("*.html", FETCHED), ("*.css", IMPORTED)):
        for file in site.rglob(kind):
            yield from pattern.findall(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="zensical is in the docs extra (make docs)")
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    return folder / "build" / "site"


def test_no_page_asks_another_host(site: Path) -> None:
    assert (site / "index.html").exists()
    assert set(requests(site)) == set()


def test_search_finds_pages_by_their_words(site: Path) -> None:
    text = (site / "search.json").read_text(encoding="utf-8")
    assert json.loads(text)
    for word in ("withdraw", "trimmed_mean", "max_fallback_epsilon", "clinical"):
        assert word in text


def test_every_page_is_built(site: Path) -> None:
    pages = [path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")]
    assert [str(p) for p in pages if not (site / p.with_suffix(".html")).exists()] == []


def test_every_page_is_one_click_from_the_index() -> None:
    """The README is the index; a page of docs/ is in its text or in the navigation beside it."""
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = {target.partition("#")[0] for target in LINK.findall(index)}
    linked |= set(re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text()))
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - linked - {"docs/mutants.md"} == set()  # written by `make mutants`, for engineers


# What newcomers looked for and did not find: a word of the page that answers it, one click away.
SOUGHT = {
    "presets that learn": ("docs/own-records.md", "--task"),
    "trying without spending a budget": ("docs/rehearsal.md", "fedtune tune"),
    "answers that are cut off": ("docs/own-records.md", "overflow"),
    "a classifier to use": ("docs/serving.md", "fedtune predict"),
    "three sites on one machine": ("README.md", "--sites"),
    "is this run what it says": ("docs/verify.md", "fedtune verify"),
    "what is in my files": ("docs/intake.md", "fedtune data report"),
    "every key": ("docs/configuration.md", "append_eos"),
    "an officer's file": ("docs/release.md", "fedtune approve"),
    "from Python, a notebook": ("docs/library.md", "notebook"),
    "trackers": ("docs/observability.md", "mlflow"),
    "a page in a browser": ("docs/dashboard.md", "fedtune dashboard"),
    "three hospitals, step by step": ("docs/consortium.md", "fedtune admit"),
    "a withdrawal and its receipt": ("docs/intake.md", "fedtune withdraw"),
    "systems, memory": ("README.md", "1.56 GB of memory"),
    "a security contact": ("SECURITY.md", "report"),
    "a glossary": ("docs/glossary.md", "unit"),
    "what to do after a bad first run": ("docs/faq.md", "learned nothing"),
}


@pytest.mark.parametrize("task", SOUGHT)
def test_what_newcomers_sought_is_one_click_away(task: str) -> None:
    page, words = SOUGHT[task]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page == "README.md" or page in {t.partition("#")[0] for t in LINK.findall(readme)}
    assert words in (ROOT / page).read_text(encoding="utf-8")


def test_twin_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="zensical is in the docs extra (make docs)")
    page = tmp_path / "build" / "pages" / "docs" / "faq.md"
    page.parent.mkdir(parents=True)
    page.write_text("# Questions\n\n[nowhere](no-such-page.md)\n", encoding="utf-8")
    assert build(tmp_path).returncode != 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://unpkg.com/iframe-worker/shim"></script>'),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example.org/a.css">'),
        ("a.html", "<img src=//example.org/pixel.png>"),
        ("a.css", "@font-face { src: url(https://fonts.example.org/a.woff2) }"),
    ],
)
def test_twin_a_request_to_another_host_is_found(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert len(list(requests(tmp_path))) == 1


def test_a_link_to_another_host_is_no_request(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="https://flower.ai">Flower</a>')
    assert list(requests(tmp_path)) == []
