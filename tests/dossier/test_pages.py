"""The dossier's pages as people meet them: in a browser by eye, ear and keyboard, and on paper."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedtune.evidence.dossier import pdf as pdf_module
from fedtune.evidence.dossier import release as release_module
from fedtune.evidence.dossier.page import POLICY
from tests.cli_kit import run as command
from tests.depth import long_but

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(os.environ.get("FEDTUNE_AXE", "node_modules/axe-core/axe.min.js"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
needs_pdf = pytest.mark.skipif(
    importlib.util.find_spec("fpdf") is None, reason="fpdf2 is not installed"
)


def in_browser(page: Path, script: str, folder: Path) -> Any:
    """What a script says in a browser about a page whose policy lets it run."""
    text = page.read_text(encoding="utf-8")
    assert POLICY in text
    run = f"<script>{script}.then(r => document.title = 'FOUND' + JSON.stringify(r))</script>"
    text = text.replace(POLICY, "default-src 'unsafe-inline' data:").replace(
        "</body>", f"{run}</body>"
    )
    copy = folder / "page.html"
    copy.write_text(text, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000")
    home = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *flags, home, "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<title>FOUND(.*?)</title>", done.stdout, re.S)
    assert found, done.stderr[-500:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed")
@pytest.mark.skipif(not AXE.is_file(), reason=f"axe-core is not here: {AXE} (FEDTUNE_AXE)")
@pytest.mark.parametrize("name", long_but(["dossier.html"], ["dossier.html", "assurance.html"]))
def test_axe_finds_nothing_and_would(released: Any, tmp_path: Path, name: str) -> None:
    """Twin: the same page without its language and with an empty heading."""
    axe = AXE.read_text(encoding="utf-8").replace("</script", "<\\/script")
    rules = f"{{runOnly: {json.dumps(RULES)}}}"
    script = f"{axe};axe.run(document, {rules}).then(r => r.violations.map(v => v.id))"
    page = released[0] / name
    assert in_browser(page, script, tmp_path) == []
    bad = tmp_path / "bad.html"
    text = page.read_text(encoding="utf-8").replace('<html lang="en">', "<html>")
    bad.write_text(text.replace("</h1>", "</h1><h4></h4>"), encoding="utf-8")
    assert {"html-has-lang", "empty-heading"} <= {*in_browser(bad, script, tmp_path)}


@needs_pdf
def test_the_pdf_holds_every_section_and_figure(released: Any, tmp_path: Path) -> None:
    path = released[0] / "dossier.pdf"
    assert path.read_bytes().startswith(b"%PDF-")
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    done = subprocess.run(["pdftotext", "-layout", path, "-"], capture_output=True, check=True)
    text = re.sub(r"\s+", " ", done.stdout.decode().replace("\u200b", ""))
    content = json.loads((released[0] / "dossier.json").read_text())
    assert [s["title"] for s in content["sections"] if s["title"].split(":")[0] not in text] == []
    assert text.count("7.988") >= 4 and "☐ TO BE FILLED BY A PERSON" in text
    assert "page 1 of" in text and "Not a medical device" in text


def test_without_fpdf2_there_is_no_pdf_and_the_command_says_so(
    signed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_module, "can_write", lambda: False)
    done = command("release", signed[0], "--out", tmp_path / "out")
    assert done.exit_code == 0 and "no dossier.pdf: it needs fpdf2" in done.output
    assert not (tmp_path / "out" / "dossier.pdf").exists()


@needs_pdf
def test_a_long_word_is_broken_and_none_is_lost() -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    for word in (digest, "run/adapter/adapter_model.safetensors", "a-word"):
        assert pdf_module._make_breakable(word).replace(pdf_module.BREAK, "") == word
    parts = pdf_module._make_breakable(digest).split(pdf_module.BREAK)
    assert max(map(len, parts)) <= pdf_module.LONG
