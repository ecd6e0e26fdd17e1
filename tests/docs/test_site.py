"""The documentation site is built offline from the pages as they lie, and asks no other host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

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
    assert pages - linked == set()


# What newcomers looked for -> the page, its section ("" the page's beginning), and a word of it.
SOUGHT = {
    "from a clone to a model in use": ("docs/researcher.md", "", "fedtune predict"),
    "presets that learn": ("docs/researcher.md", "4-write-the-study-a-minute", "--task"),
    "three sites on one machine": ("docs/own-records.md", "classes-of-texts", "--sites"),
    "trying without spending a budget": ("docs/rehearsal.md", "declaring-data", "generated"),
    "searching settings": ("docs/rehearsal.md", "", "fedtune tune"),
    "which base": ("docs/models.md", "which-base-fedtune-choose-base", "choose-base"),
    "my first run learned nothing": ("docs/faq.md", "", "learned nothing"),
    "a run that got worse": ("docs/rescue.md", "a-run-got-worse", "worse than the base"),
    "a run that was refused": ("docs/rescue.md", "a-site-is-out-of-budget", "max_epsilon"),
    "after kill -9": ("docs/rescue.md", "what-happens-when-something-fails", "kill -9"),
    "a lost coordinator": ("docs/rescue.md", "the-coordinator-is-lost", "fedtune restore"),
    "three figures of ε": ("docs/rehearsal.md", "three-figures-of-ε", "planned"),
    "answers that are cut off": ("docs/own-records.md", "nothing-is-lost-silently", "overflow"),
    "semicolons, encodings": ("docs/intake.md", "files-and-folders", "encoding"),
    "what is in my files": ("docs/intake.md", "files-and-folders", "fedtune data report"),
    "a Hugging Face data set": ("docs/intake.md", "a-hugging-face-data-set", "Hugging Face"),
    "a database, OMOP": ("docs/intake.md", "omop", "OMOP"),
    "FHIR": ("docs/intake.md", "fhir", "FHIR"),
    "consent and opt-outs": ("docs/intake.md", "consent-and-opt-outs", "consent"),
    "a withdrawal and its receipt": ("docs/intake.md", "withdrawals-and-their-receipts", "receipt"),
    "identifiers in texts": ("docs/intake.md", "scanning-records-for-identifiers",
                             "fedtune data scan"),
    "every key": ("docs/configuration.md", "objective", "append_eos"),
    "overriding a key": ("docs/rehearsal.md", "", "--set"),
    "a classifier to use": ("docs/models.md", "labels-fedtune-predict", "fedtune predict"),
    "the model in Python": ("docs/models.md", "a-folder-for-transformers-fedtune-export",
                            "pipeline"),
    "is this run what it says": ("docs/verify.md", "", "fedtune verify"),
    "three hospitals, step by step": ("docs/coordinator.md", "4-admit-the-hospitals-a-call-each",
                                      "fingerprint"),
    "the site's commands": ("docs/hospital.md", "5-take-part", "fedtune doctor"),
    "certificates, keys, revoking": (
        "docs/rescue.md", "keys-certificates-connections", "fedtune revoke"
    ),
    "life signs, logs": ("docs/observability.md", "", "fedtune status"),
    "trackers": ("docs/observability.md", "trackers", "mlflow"),
    "a page in a browser": ("docs/observability.md", "a-page-in-a-browser", "fedtune dashboard"),
    "is it good enough for our patients": ("docs/acceptance.md", "", "fedtune accept"),
    "an officer's file": ("docs/verify.md", "a-run-as-a-dossier", "fedtune approve"),
    "a data sheet": ("docs/intake.md", "a-sites-data-sheet", "fedtune data describe"),
    "retention": ("docs/retention.md", "", "fedtune purge"),
    "who did what": ("docs/retention.md", "the-audit-log", "fedtune log"),
    "what a guess is worth, for a board": ("docs/for-boards.md", "", "guess"),
    "from Python": ("docs/library.md", "from-a-dataframe-to-a-run", "DataFrame"),
    "a notebook": ("docs/library.md", "notebooks", "notebook"),
    "my own strategy": ("docs/extending.md", "a-strategy", "class"),
    "my own loss": ("docs/extending.md", "an-objective", "class"),
    "a GPU": ("docs/installing.md", "on-a-gpu", "CUDA_VISIBLE_DEVICES"),
    "systems, memory": ("README.md", "what-it-runs-on", "1.56 GB of memory"),
    "installing, disk": ("docs/installing.md", "", "1.6 GB"),
    "completion in the shell": ("docs/installing.md", "completions-and-the-manual-page", "zsh"),
    "what may change": ("docs/versions.md", "", "protocol"),
    "a glossary": ("docs/glossary.md", "", "unit"),
    "beside other projects": ("docs/faq.md", "beside-other-projects", "NVIDIA FLARE"),
    "a security contact": ("SECURITY.md", "", "report"),
    "changing it": ("CONTRIBUTING.md", "", "make test"),
}  # fmt: skip


def name_of(page: str) -> str:
    return page.removesuffix(".md").replace("README", "index") + ".html"


@pytest.mark.parametrize("task", SOUGHT)
def test_what_newcomers_sought_is_two_clicks_from_the_index(task: str, site: Path) -> None:
    """One in the built index, in its text or navigation, and one in the page's own contents."""
    page, section, word = SOUGHT[task]
    index, target = Built(site / "index.html"), Built(site / name_of(page))
    assert page == "README.md" or name_of(page) in {link.partition("#")[0] for link in index.links}
    assert word in target.text
    if section:
        assert section in target.ids
        contents = {unquote(link) for link in target.links}
        assert f"#{section}" in contents, sorted(contents)


class Built(HTMLParser):
    """A built page: its links, its elements' ids, its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.ids, self._words = path, list[str](), set[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        return "".join(self._words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.ids |= {known[key] or "" for key in ("id", "name") if key in known}
        address = known.get("href" if tag in ("a", "link") else "src")
        if address and not re.match(r"[a-z]+:|//", address):
            self.links.append(address)

    def handle_data(self, data: str) -> None:
        self._words.append(data)


def dead(site: Path) -> list[str]:
    """Links of built pages that lead to no file, or to no place in it."""
    pages = {path.resolve(): Built(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            where, _, place = unquote(link).partition("#")
            target = (path.parent / where.partition("?")[0]).resolve() if where else path
            target = target / "index.html" if target.is_dir() else target
            missing = place and target in pages and place not in pages[target].ids
            if not target.exists() or missing:
                found.append(f"{path.name}: {link}")
    return found


def test_no_link_of_a_built_page_is_dead(site: Path, tmp_path: Path) -> None:
    """Twins: a file and a place that are not there."""
    assert dead(site) == []
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#c">c</a><a href="">d</a>')
    assert dead(tmp_path) == ["a.html: b.html", "a.html: #c"]


@pytest.mark.long
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
