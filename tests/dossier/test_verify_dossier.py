"""A dossier that was changed, forged, or never the run's is refused, and by what."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import FedtuneError, NotGenuine, Refused
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence.dossier import seal
from fedtune.evidence.dossier.content import dump_content
from fedtune.evidence.dossier.facts import documents, facts_in, numbers, resolve, show
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.verify import verify
from tests.cli_kit import run as command
from tests.dossier.conftest import again
from tests.verify_kit import forged, lower

CHANGES = 1000


def test_a_dossier_shows_what_its_run_proves(released: Any, signed: Any) -> None:
    folder, found = released
    assert found.epsilon == signed[1].epsilon and found.simulated and not found.trusted
    assert not verify(folder, trust=found.signer).trusted  # it is a simulation's
    assert found.dossier["run signed by"] == signed[1].signer
    assert found.dossier["approvals"] == [] and found.not_signed == ()
    assert {"run/adapter/adapter_model.safetensors", "dossier.html"} <= {*seal.list_covered(folder)}


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_anywhere_is_refused(released: Any, tmp_path: Path, seed: int) -> None:
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    digest = seal.read_release(copy)[1]
    one = seal.approval(digest, SigningKey(), "A", "board", "read")
    approved = f"{seal.APPROVALS}/{seal.file_name(one['key'])}"
    (copy / seal.APPROVALS).mkdir()
    (copy / approved).write_bytes(canonical(one))
    rng = random.Random(seed)
    names = [*seal.list_covered(copy), seal.RELEASE, approved]
    for number in range(CHANGES // 4):
        path = copy / names[number % len(names)]
        whole = path.read_bytes()
        at, how = rng.randrange(len(whole)), rng.randrange(3)
        other = bytes([rng.choice([n for n in range(256) if n != whole[at]])])
        space = rng.choice([b" ", b"\n", b"="])
        changed = [
            whole[:at] + other + whole[at + 1 :],
            whole[:at] + space + whole[at:],
            whole[:at] + whole[at + 1 :],
        ][how]
        path.write_bytes(changed)
        with pytest.raises(FedtuneError) as raised:
            verify(copy)
        assert path.name in str(raised.value), (path, how, at)
        path.write_bytes(whole)
    verify(copy)


def test_a_file_that_is_added_removed_or_linked_is_named(released: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    for name in ("notes.txt", "run/adapter/modeling.py", "run/notes.txt"):
        (copy / name).write_text("pass")
        with pytest.raises(NotGenuine, match=rf"{name}: was added"):
            verify(copy)
        (copy / name).unlink()
    (copy / "dossier.html").rename(copy.parent / "page.html")
    with pytest.raises(NotGenuine, match=r"dossier\.html: is missing"):
        verify(copy)
    (copy / "dossier.html").symlink_to(copy.parent / "page.html")
    with pytest.raises(NotGenuine, match=r"dossier\.html: was changed"):
        verify(copy)


def test_who_replaces_every_key_is_refused_by_trust_alone(released: Any, tmp_path: Path) -> None:
    folder, found = released
    copy = again(shutil.copytree(folder, tmp_path / "dossier"))
    assert verify(copy).epsilon == found.epsilon  # nothing in it contradicts itself
    with pytest.raises(Refused, match="was signed by"):
        verify(copy, trust=found.signer)


def test_without_its_signature_a_dossier_proves_nothing(released: Any, tmp_path: Path) -> None:
    """Twin: the run inside verifies, so that a page beside it must not pass as proven."""
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    (copy / seal.RELEASE).unlink()
    assert verify(copy / "run").epsilon
    with pytest.raises(NotGenuine, match="is a dossier that is not signed"):
        verify(copy)


def test_a_dossier_around_a_forged_run_is_refused(
    released: Any, signed: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    bad = forged(signed[0], tmp_path / "other", lower)
    shutil.copy(bad / "report.json", copy / "run" / "report.json")
    shutil.copy(bad / "signature.json", copy / "run" / "signature.json")
    with pytest.raises(NotGenuine, match="step logs"):
        verify(again(copy))


def test_a_consortiums_dossier_is_signed_by_its_runs_coordinator(
    released: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    seal.sign(copy, SigningKey(), "-----BEGIN CERTIFICATE-----")
    with pytest.raises(NotGenuine, match=r"dossier/run: was signed by"):
        verify(copy)


def _in_json(copy: Path) -> None:
    content = json.loads((copy / seal.CONTENT).read_text())
    fact = next(f for f in facts_in(content) if f["source"] == "report.json#/privacy/epsilon")
    fact["shown"] = "0.5"
    (copy / seal.CONTENT).write_text(json.dumps(content))


def _in(name: str) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        text = (copy / name).read_text()
        epsilon = "7.988"
        assert epsilon in text
        (copy / name).write_text(text.replace(epsilon, "0.5"))

    return change


def _written(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(copy: Path) -> None:
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new, 1))

    return change


def _without_limits(copy: Path) -> None:
    """The content without what speaks against it, and pages that follow from it."""
    content = json.loads((copy / seal.CONTENT).read_text())
    for section in content["sections"]:
        section["blocks"] = [b for b in section["blocks"] if b["kind"] not in ("note", "list")]
    (copy / seal.CONTENT).write_text(dump_content(content))
    (copy / "dossier.md").write_text(markdown(content))


def _added(copy: Path) -> None:
    (copy / "summary.html").write_text("<p>ε = 0.5</p>")


def _picture_in_the_page(copy: Path) -> None:
    """The curve of a better run, where the page has this one's."""
    page, file = copy / "dossier.html", copy / "pictures" / "quality.svg"
    text, drawn = page.read_text(), file.read_text()
    old, new = (b64encode(svg.encode()).decode() for svg in (drawn, drawn.replace("base", "best")))
    assert text.count(old) == 1 and new != old
    page.write_text(text.replace(old, new))


def _picture_of_no_page(copy: Path) -> None:
    shutil.copy(copy / "pictures" / "trust.svg", copy / "pictures" / "masked-round.svg")


HIDING = '<style>main{display:none}body::after{content:"ε = 0.5"}</style>'
SCRIPT = "<script>document.body.textContent = 'safe'</script>"
FALSE_HEAD = "<main><head><p>ε = 0.5</p></head>"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (r"dossier\.html: is not what", _written("dossier.html", "<main", FALSE_HEAD + "<main")),
        (r"dossier\.md: is not what", _written("dossier.md", "# Dossier", "---\n0.5\n---\n# Doss")),
        (r"README\.md: is not what", _written("README.md", "value: ", "value: 1")),
        (r"dossier\.json: says 0\.5", _in_json),
        (r"dossier\.md: is not what", _in("dossier.md")),
        (r"dossier\.html: is not what", _in("dossier.html")),
        (r"README\.md: is not what", _in("README.md")),
        (r"dossier\.json: is not what", _without_limits),
        (r"dossier\.html: is not what", _written("dossier.html", "</head>", HIDING + "</head>")),
        (r"dossier\.html: is not what", _written("dossier.html", "<main", SCRIPT + "<main")),
        (
            r"README\.md: is not what",
            _written("README.md", "---\n", "---\nregulatory: class IIa\n"),
        ),
        (r"trust\.svg: is not what", _written("pictures/trust.svg", "ε holds", "ε is 0")),
        (r"quality\.svg: is not what", _written("pictures/quality.svg", "base alone", "before")),
        (r"dossier\.html: is not what", _picture_in_the_page),
        (r"masked-round\.svg: is a picture that no page shows", _picture_of_no_page),
        (r"summary\.html: is no file of a dossier", _added),
    ],
    ids=[
        *("false head", "false front", "metric", "json", "md", "html", "card"),
        *("limits", "style", "script", "claim", "picture", "curve", "shown picture"),
        *("spare picture", "page"),
    ],
)
def test_a_number_that_is_not_the_runs_is_refused_whoever_signs_it(
    released: Any, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    """Twin: the same folder, signed again as it was, verifies."""
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    verify(again(copy))
    change(copy)
    with pytest.raises(NotGenuine, match=name):
        verify(again(copy))


def test_every_number_on_every_page_is_a_fact_of_the_run_or_the_packages_own(
    released: Any,
) -> None:
    """What is left of a page without the package's texts and what a person typed is facts, and a
    fact is what its source in the run says."""
    from fedtune.evidence.dossier.content import sections
    from fedtune.report.claim import limits

    folder, _ = released
    found, content = documents(folder / "run"), json.loads((folder / seal.CONTENT).read_text())
    shown = [fact["shown"] for fact in facts_in(content)]
    assert len(shown) > 40
    for fact in facts_in(content):
        assert show(resolve(found, fact["source"]), fact["how"]) == fact["shown"]
    own = {*numbers(json.dumps([*sections(), limits("record")], ensure_ascii=False))}
    own |= {*numbers(json.dumps([*found["evidence.json"]["sites"]]))} | {*numbers("room 7 & 8")}
    allowed = own | {number for text in shown for number in numbers(text)}
    text = (folder / "dossier.md").read_text()
    assert numbers(text) == numbers(markdown(content))
    links = [line for line in text.splitlines() if line.startswith("- [")]
    rest = [line for line in text.splitlines() if line not in links]
    assert {*numbers("\n".join(rest))} <= allowed


def test_verifying_a_dossier_is_quick_and_needs_no_torch(released: Any) -> None:
    code = (
        "import sys; from fedtune.evidence.verify import verify; "
        f"verify({str(released[0])!r}); "
        "assert not {'torch', 'flwr', 'huggingface_hub', 'fpdf'} & {*sys.modules}"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.monotonic() - began < 30  # 1 s where nothing else runs


def test_the_command_shows_a_dossier(released: Any) -> None:
    folder, found = released
    known = command("verify", folder, "--trust", found.signer, "--simulation")
    assert known.exit_code == 0 and "as fedtune writes them of this run" in known.output
    assert "by nobody yet" in known.output
    assert command("verify", folder).exit_code == 3
    data = json.loads(command("verify", folder, "--simulation", "--json").output)
    assert data["dossier"]["files"] == found.dossier["files"]


def test_what_is_the_signers_word_alone_is_named(released: Any, tmp_path: Path) -> None:
    """A trusted signer may put a PDF of his own making there: the output does not vouch for it. Of
    a page that is compared, another one is refused."""
    folder, found = released
    named = {"dossier.pdf", "sbom.cdx.json", "audit.md", "model.sig", "model.pub"}
    signed = {*found.dossier["its word"]}
    assert {"dossier.pdf", "sbom.cdx.json"} <= signed <= named
    copy = shutil.copytree(folder, tmp_path / "dossier")
    (copy / "dossier.pdf").write_bytes(b"%PDF-1.7 /OpenAction << /S /JavaScript >>")
    (copy / "sbom.cdx.json").write_text("{}")
    shown = command("verify", again(copy)).stdout
    line = next(line for line in shown.splitlines() if line.startswith("not compared "))
    assert "dossier.pdf" in line and "sbom.cdx.json" in line and "word alone" in line
    assert "dossier.md" not in line and "run/" not in line


def test_the_pages_of_another_release_are_their_signers_word(
    released: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words are that release's. Figures that were changed on a page are found all the same; a
    signer who writes another epsilon into every page is not, so no page is vouched for."""
    copy = shutil.copytree(released[0], tmp_path / "dossier")
    monkeypatch.setattr(seal, "__version__", "9.9")
    page = copy / "dossier.md"
    page.write_text(page.read_text().replace("# Dossier", "# Another title", 1))
    found = verify(again(copy))
    assert found.dossier["made by"] == "9.9" and not found.dossier["word by word"]
    pages = {"dossier.json", "dossier.md", "dossier.html", "README.md", "assurance.json"}
    assert pages | {"registry.yaml"} <= {*found.dossier["its word"]}
    shown = command("verify", copy, "--simulation")
    assert shown.exit_code == 3
    assert "nobody but its signer vouches for them" in " ".join(shown.output.split())
    assert "ε = " in shown.stdout
    _in("dossier.md")(copy)
    with pytest.raises(NotGenuine, match=r"dossier\.md: is not what"):
        verify(again(copy))


def test_twin_this_releases_pages_need_nobodys_word(released: Any) -> None:
    shown = command("verify", released[0], "--simulation")
    assert shown.exit_code == 0 and "nobody but its signer" not in shown.output
