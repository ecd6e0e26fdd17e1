"""The pages say what is true today: their links lead somewhere, and their code is run."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tests.docs.pages import NOT_RUN, ROOT, broken_links, missing_files, read, run

FOLDERS = (".", "client", "server", "docs", "docs/decisions", "deploy", "examples/*", ".github")
PAGES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_page_is_looked_at() -> None:
    names = {name(path) for path in PAGES}
    assert names >= {"README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/guarantee.md"}
    assert {name(path) for path in (ROOT / "docs").rglob("*.md")} <= names


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=name)
def test_a_page_says_first_whom_it_is_for(path: Path) -> None:
    assert audience(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["# A page\n\nIt is long.\n", "# A page\n", "For nobody.\n"])
def test_twin_a_page_for_nobody_is_found(page: str) -> None:
    assert not audience(page)


def audience(text: str) -> str | None:
    """Return the line under the title if it names the reader, as "For an auditor", else None."""
    found = re.match(r"# .+\n\n\*?(For .+)", text)
    return found[1] if found else None


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert list(broken_links(path)) == []


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name != "decisions"], ids=name)
def test_files_that_are_named_are_there(path: Path) -> None:
    """Decisions tell what was true then."""
    assert list(missing_files(path)) == []


def test_twin_a_file_that_is_not_there_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("`core/dp/clip.py`, `fedtune/core/dp/clip.py`, `dp/no_such.py`, `Step`\n")
    assert list(missing_files(page)) == ["dp/no_such.py"]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_hold(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in read(path.read_text(encoding="utf-8")).blocks:
        folder = tmp_path / str(block.line)
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            run(block, folder)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name(path)}:{block.line}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("target", ["no.md", "page.md#no-such-heading", "#no-such-heading"])
def test_twin_a_broken_link_is_found(target: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# One `heading`, here\n\n[a](page.md#one-heading-here), [b]({target})\n")
    assert list(broken_links(page)) == [target]


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("sh", "fedtune simulate study.toml --no-such-flag", click.UsageError),
        ("sh", "cd there && .venv/bin/fedtune no-such-command", AssertionError),
        ("sh", "fedtune plan STUDY \\\n    --size many", click.UsageError),
        ("sh", "OMP_NUM_THREADS=1 make no-such-target", AssertionError),
        ("sh", "python -m benchmarks.no_such_module", AssertionError),
        ("sh", "python -m pytest -q tests/docs/no_such_file.py", AssertionError),
        ("sh", "python -m pytest -q tests/docs/test_docs.py::test_nothing", AssertionError),
        ("sh", "python -m tests.mutants.run --only no-such-bug", AssertionError),
        ("python", "import fedtune\nfedtune.no_such_name", AttributeError),
        (
            "python",
            'def one():\n    """\n    >>> one()\n    2\n    """\n    return 1',
            AssertionError,
        ),
        ("toml", "[training]\nno_such_key = 1", AssertionError),
        ("toml", "[training]\nrounds = -1", AssertionError),
        ("toml", "[site]\nname = my-hospital", ValueError),
        ("text", "anything", AssertionError),
        ("", "anything", AssertionError),
    ],
)
def test_twin_a_block_that_does_not_hold_is_found(
    language: str, text: str, error: type[Exception], tmp_path: Path
) -> None:
    page = f"A page.\n\n```{language}\n{text}\n```\n"
    (block,) = read(page).blocks
    with pytest.raises(error):
        run(block, tmp_path)
    marked = page.replace("```" + language, "<!-- not run: a reason -->\n```" + language, 1)
    (block,) = read(marked).blocks
    run(block, tmp_path)


def test_twin_a_whole_file_is_loaded(tmp_path: Path) -> None:
    text = (ROOT / "docs/own-records.md").read_text(encoding="utf-8")
    study = next(block for block in read(text).blocks if "[study]" in block.text)
    run(study, tmp_path)
    (wrong,) = read(f"```toml\n{study.text.replace('delta = 1e-4', '')}```\n").blocks
    with pytest.raises(Exception, match=r"delta"):
        run(wrong, tmp_path)


@pytest.mark.parametrize("page", ["Text.\n\n    fedtune demo\n", "```sh\nfedtune demo\n"])
def test_twin_code_that_nothing_would_check_is_found(page: str) -> None:
    with pytest.raises(AssertionError):
        read(page)


def test_twin_a_mark_without_a_reason_is_none() -> None:
    assert not NOT_RUN.fullmatch("<!-- not run:  -->")
