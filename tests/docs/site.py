"""Build the documentation site from the pages as they lie, without a copy of one.

    python -m tests.docs.site

The generator follows no links to folders, so each page gets a link of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT

LINKED = (
    "CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "README.md",
    "SECURITY.md", "client", "deploy", "docs", "examples", "fedtune/dashboard/static/LICENSES.md",
    "server",
)  # fmt: skip
# What is kept for who changes fedtune: a reader's words are found in the other pages.
NOT_SEARCHED = ("CHANGELOG.html", "docs/decisions/", "docs/mutants.html")


def lay(folder: Path) -> None:
    """Make links in the folder to every file that is a page, or that a page links to."""
    for name in LINKED:
        top = ROOT / name
        files = top.rglob("*") if top.is_dir() else [top]
        for file in files:
            link = folder / file.relative_to(ROOT)
            if file.is_file() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build FOLDER/build/site by zensical.toml. A link that leads nowhere is an error."""
    lay(folder / "build" / "pages")
    config = folder / "zensical.toml"
    if not config.exists():
        config.write_text((ROOT / "zensical.toml").read_text(encoding="utf-8"), encoding="utf-8")
    generator = Path(sys.executable).with_name("zensical")
    done = subprocess.run(
        [generator, "build", "--clean", "--strict", "--config-file", config],
        cwd=folder, text=True, capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        shorten_index(folder / "build" / "site" / "search.json")
    return done


def shorten_index(index: Path) -> None:
    """Take out of the index of the search what NOT_SEARCHED names."""
    found = json.loads(index.read_text(encoding="utf-8"))
    items = [each for each in found["items"] if not each["location"].startswith(NOT_SEARCHED)]
    text = json.dumps(found | {"items": items}, ensure_ascii=False)
    index.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    done = build(ROOT)
    print(done.stdout + done.stderr, end="")
    sys.exit(done.returncode)
