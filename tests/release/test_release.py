"""The files of a release: built twice from a commit, stated, signed; one byte changed is caught.

The clean room and the real pages are `make release`'s own: here the site is two pages, and the bill
of materials one line."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedtune.core.errors import InputError
from tests.docs.pages import ROOT
from tests.release import __main__ as make
from tests.release import build, check, statement
from tests.release.build import NotReleasable
from tests.release.statement import NotAsReleased
from tests.test_distribution import copy_of

pytest.importorskip("hatchling", reason="hatchling is in the dev extra")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not here"),
]
SAFE = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit of this tree, as far as a build reads it."""
    folder = copy_of(tmp_path_factory.mktemp("release") / "clone", 1_600_000_000, 0o022)
    for name in ("CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    kept = Path("tests/formats/data")  # in which a folder is a link to another
    shutil.copytree(ROOT / kept, folder / kept, symlinks=True)
    build.git(folder, "init", "--quiet")
    build.git(folder, "add", "--all")
    build.git(folder, *SAFE, "commit", "--quiet", "--message", "All of it")
    return folder


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("key") / "release.pem", Ed25519PrivateKey.generate())


def written(path: Path, key: Any) -> Path:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def unsigned(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a release that nobody has signed."""
    dist = tmp_path_factory.mktemp("unsigned") / "dist"
    dist.mkdir()
    commit, version = build.clean_commit(clone), build.check_versions(clone)
    build.build_twice(clone, commit, dist)
    pages = dist.parent / "pages"
    (pages / "docs").mkdir(parents=True)
    for name in ("index.html", "docs/versions.html"):
        (pages / name).write_text(f"<p>{name}</p>")
    build.pack(pages, dist / f"fedtune-{version}-site.tar.gz")
    component = {"metadata": {"component": {"name": "fedtune", "version": version}}}
    (dist / "fedtune.cdx.json").write_text(json.dumps(component))
    images = {"fedtune-site": "sha256:" + "0" * 64}
    (dist / check.IMAGES).write_text(json.dumps(images))
    state(dist, clone, commit)
    return dist


def state(dist: Path, clone: Path, commit: str) -> None:
    """Write the statement of what lies there, and the sums."""
    for old in (*dist.glob("*.json*"), dist / check.KEY, dist / check.SUMS):
        if old.name.endswith((check.UNSIGNED, check.SIGNED)) or old.name in (check.KEY, check.SUMS):
            old.unlink(missing_ok=True)
    said = statement.make(
        make.sums(dist) | {"fedtune-site": "0" * 64},
        commit=commit,
        source="",
        parameters={"version": build.read_version(clone)},
        materials=build.materials(clone),
        packages=build.builders(clone),
        builder=statement.BUILDER,
        started=statement.now(),
    )
    (dist / f"fedtune-0{check.UNSIGNED}").write_text(json.dumps(said))
    make.write_sums(dist)


@pytest.fixture(scope="module")
def once(unsigned: Path, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = shutil.copytree(unsigned, tmp_path_factory.mktemp("signed") / "dist")
    make.sign(dist, key)
    return dist


@pytest.fixture
def signed(once: Path, tmp_path: Path) -> Path:
    """A signed release, to be changed."""
    return shutil.copytree(once, tmp_path / "dist")


def of(key: Path) -> str:
    return statement.fingerprint(statement.private_key(key).public_key())


def told(dist: Path, clone: Path, wanted: str = "") -> str:
    return "\n".join(check.check(dist, clone, wanted))


def test_a_release_is_what_it_says_in_a_clone_and_without_one(
    signed: Path, unsigned: Path, clone: Path, key: Path, tmp_path: Path
) -> None:
    said = told(signed, clone, of(key))
    assert f"signed by {of(key)}" in said and "NOT" not in said and "not compared" not in said
    assert "built again from the sdist" in said and "as in commit" in said
    (archive,) = signed.glob("*0.tar.gz")
    with tarfile.open(archive) as tar:
        assert any(name.endswith("daily/versions/1/adapter_config.json") for name in tar.getnames())
    alone = told(signed, tmp_path)
    assert "not compared with commit" in alone and "compare it with what the project" in alone
    assert "NOT SIGNED" in told(unsigned, clone)
    with pytest.raises(NotAsReleased, match="nobody signed"):
        told(unsigned, clone, of(key))


def test_a_check_needs_no_more_than_the_wheel_brings() -> None:
    """Twin: making a release does."""
    look = "import sys, tests.release.{0}, {1}; print('pytest' in sys.modules)"
    for more, needed in (("sys", "False"), ("tests.docs.site", "True")):
        words = [sys.executable, "-c", look.format("__main__", more)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == needed


def change(path: Path) -> None:
    """One byte in the middle."""
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


KINDS = (
    ".whl",
    "0.tar.gz",
    "site.tar.gz",
    ".cdx.json",
    ".intoto.jsonl",
    ".pub",
    "SUMS",
    "images.json",
)


@pytest.mark.parametrize("kind", KINDS)
def test_one_byte_changed_is_caught(signed: Path, clone: Path, key: Path, kind: str) -> None:
    (path,) = signed.glob(f"*{kind}")
    change(path)
    with pytest.raises(NotAsReleased):
        told(signed, clone, of(key))
    if kind != "SUMS":
        make.write_sums(signed)  # whoever changes a file also writes its sum
        with pytest.raises(NotAsReleased):
            told(signed, clone, of(key))


def test_a_file_more_or_less_is_caught(signed: Path, clone: Path) -> None:
    (signed / "more.whl.txt").write_text("read me")
    with pytest.raises(NotAsReleased, match="more"):
        told(signed, clone)
    (signed / "more.whl.txt").unlink()
    (signed / "fedtune.cdx.json").unlink()
    make.write_sums(signed)
    with pytest.raises(NotAsReleased, match=r"cdx\.json: in the statement, and not here"):
        told(signed, clone)


def test_another_key_is_caught(unsigned: Path, clone: Path, key: Path, tmp_path: Path) -> None:
    """Who changes a file, its sum, the statement and the signature has another key."""
    dist = shutil.copytree(unsigned, tmp_path / "dist")
    make.sign(dist, written(tmp_path / "other.pem", Ed25519PrivateKey.generate()))
    assert "signed by" in told(dist, clone)
    with pytest.raises(NotAsReleased, match=f"a signature by {of(key)}"):
        told(dist, clone, of(key))


def rewritten(wheel: bytes, name: str, text: bytes) -> bytes:
    """The wheel with a file changed, or added, and its RECORD made to fit."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as old:
        files = {each: old.read(each) for each in old.namelist()}
    record = next(each for each in files if each.endswith("RECORD"))
    files[name] = files.get(name, b"") + text
    digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
    lines = [x for x in files[record].decode().splitlines() if not x.startswith(f"{name},")]
    lines.append(f"{name},sha256={digest},{len(files[name])}")
    files[record] = "\n".join(lines).encode() + b"\n"
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as new:
        for each, body in files.items():
            new.writestr(each, body)
    return made.getvalue()


INFO = "fedtune-{}.dist-info"
EVIL: dict[str, tuple[str, str]] = {
    "a module that is not in the tree": (
        "fedtune/core/dp/noise.py",
        "not as in the source archive",
    ),
    "a program beside it": ("fedtune.data/scripts/sh", "does not belong into the wheel"),
    "a dependency": ("{info}/METADATA", "other bytes when built from the sdist"),
    "an entry point": ("{info}/entry_points.txt", "other bytes when built from the sdist"),
}


@pytest.mark.parametrize("what", EVIL)
def test_a_wheel_that_is_not_of_the_tree_is_caught_whoever_signed_it(
    signed: Path, clone: Path, key: Path, what: str
) -> None:
    name, says = EVIL[what]
    (wheel,) = signed.glob("*.whl")
    name = name.format(info=INFO.format(build.read_version(clone)))
    wheel.write_bytes(rewritten(wheel.read_bytes(), name, b"\n# evil"))
    state(signed, clone, build.clean_commit(clone))
    with pytest.raises(NotAsReleased, match=says):
        make.sign(signed, key)


def test_a_source_archive_that_is_not_of_the_commit_is_caught(signed: Path, clone: Path) -> None:
    """Wheel and source archive agree: built from a tree that was changed."""
    (archive,) = signed.glob("*0.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(signed.parent / "changed", filter="data")
    (folder,) = (signed.parent / "changed").iterdir()
    (folder / "fedtune/core/dp/noise.py").write_text("# evil\n")
    for name, body in build.build(folder, signed.parent / "evil").items():
        (signed / name).write_bytes(body)
    state(signed, clone, build.clean_commit(clone))
    assert "not compared" in told(signed, signed.parent)
    with pytest.raises(NotAsReleased, match=r"noise\.py: not as in the commit"):
        told(signed, clone)


def test_other_tools_read_the_envelope_and_the_statement(signed: Path, key: Path) -> None:
    """in-toto's own libraries, which the extra [openssf] brings."""
    dsse = pytest.importorskip("securesystemslib.dsse", reason="the extra [openssf] is not here")
    statements = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    (path,) = signed.glob("*.intoto.jsonl")
    public = statement.private_key(key).public_key().public_bytes_raw().hex()
    keys = [SSlibKey(of(key), "ed25519", "ed25519", {"public": public})]
    envelope = dsse.Envelope.from_dict(json.loads(path.read_text()))
    assert envelope.verify(keys, 1)
    read = json_format.Parse(envelope.payload, statement_pb2.Statement())
    statements.Statement.copy_from_pb(read).validate()
    envelope.payload += b" "  # the twin
    with pytest.raises(VerificationError):
        envelope.verify(keys, 1)


def test_the_statement_has_what_slsa_asks_for(unsigned: Path, clone: Path) -> None:
    (path,) = unsigned.glob(f"*{check.UNSIGNED}")
    said = json.loads(path.read_text())
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    asked = said["predicate"]["buildDefinition"]
    assert asked["buildType"] and asked["externalParameters"] == {"version": "0.1.0"}
    source, *others = asked["resolvedDependencies"]
    assert source["digest"] == {"gitCommit": build.clean_commit(clone)}
    assert {each.get("name") for each in others} >= set(build.LOCKS)
    assert all(each.keys() & {"uri", "digest", "content"} for each in asked["resolvedDependencies"])
    assert any(each.get("uri", "").startswith("pkg:pypi/hatchling@") for each in others)
    assert said["predicate"]["runDetails"]["builder"]["id"]
    assert {each["name"] for each in said["subject"]} >= {"fedtune.cdx.json", "fedtune-site"}


def test_dsse_as_its_own_example_has_it() -> None:
    said = statement.to_be_signed("http://example.com/HelloWorld", b"hello world")
    assert said == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_tree_that_is_not_its_commit_is_not_released(clone: Path, tmp_path: Path) -> None:
    for spoil in (
        lambda folder: (folder / "README.md").write_text("another"),
        lambda folder: (folder / "new.py").write_text("new"),
    ):
        other = shutil.copytree(clone, tmp_path / "other", symlinks=True)
        spoil(other)
        with pytest.raises(NotReleasable, match=r"1 changed or new.*a clean clone"):
            build.clean_commit(other)
        shutil.rmtree(other)
    with pytest.raises(NotReleasable, match="no clone"):
        build.clean_commit(tmp_path)


VERSIONS: dict[str, tuple[str, str]] = {
    "CITATION.cff": ("version: 0.1.0", "version: 0.0.9"),
    "CHANGELOG.md": ("## 0.1.0", "## 0.2.0"),
    "fedtune/__init__.py": ('__version__ = "0.1.0"', '__version__ = "0.1.1"'),
}


@pytest.mark.parametrize("file", VERSIONS)
def test_two_versions_are_not_released(clone: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / "fedtune").mkdir()
    for name in ("pyproject.toml", *VERSIONS):
        shutil.copy(clone / name, tmp_path / name)
    assert build.check_versions(tmp_path) == build.read_version(clone)
    old, new = VERSIONS[file]
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(NotReleasable, match=f"{file}: version"):
        build.check_versions(tmp_path)


def test_what_git_ignores_is_in_no_file_of_a_release(clone: Path, tmp_path: Path) -> None:
    """A key or records that lie in the tree, where the build alone would take them."""
    other = shutil.copytree(clone, tmp_path / "other", symlinks=True)
    (other / "fedtune" / "runs" / "dist").mkdir(parents=True)
    (other / "fedtune" / "runs" / "dist" / "records.jsonl").write_text("a record")
    commit = build.clean_commit(other)
    laid = build.lay(other, commit, tmp_path / "laid", 0o022)
    assert not list(laid.rglob("records.jsonl")) and (laid / "fedtune/__init__.py").is_file()


def test_builds_that_differ_are_not_released(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build", lambda source, _: {"a.whl": str(source).encode()})
    with pytest.raises(NotReleasable, match="two builds gave other bytes"):
        build.build_twice(clone, build.clean_commit(clone), tmp_path)


def test_a_key_that_others_read_or_of_another_kind_signs_nothing(key: Path, tmp_path: Path) -> None:
    open_to_all = tmp_path / "open.pem"
    open_to_all.write_bytes(key.read_bytes())
    open_to_all.chmod(0o644)
    with pytest.raises(InputError, match="other users can read"):
        statement.private_key(open_to_all)
    with pytest.raises(InputError, match="another kind of key"):
        statement.private_key(written(tmp_path / "rsa.pem", generate_private_key(65537, 2048)))
    with pytest.raises(InputError, match="not a key"):
        change(shutil.copy(key, tmp_path / "bad.pem"))
        (tmp_path / "bad.pem").write_text("no key")
        statement.private_key(tmp_path / "bad.pem")


def test_the_site_is_packed_to_the_same_bytes(tmp_path: Path) -> None:
    packed = []
    for name, when in (("a", 1), ("b", 2_000_000_000)):
        (tmp_path / name / "docs").mkdir(parents=True)
        for file in ("index.html", "docs/x.html"):
            (tmp_path / name / file).write_text(file)
            os.utime(tmp_path / name / file, (when, when))
        (tmp_path / f"to-{name}").mkdir()
        packed.append(build.pack(tmp_path / name, tmp_path / f"to-{name}" / "s.tar.gz"))
    assert packed[0].read_bytes() == packed[1].read_bytes()


@pytest.mark.skipif(
    shutil.which("buildah") is None or os.geteuid() != 0, reason="no buildah, or not root"
)
def test_an_image_has_a_digest(tmp_path: Path) -> None:
    """That by which the archive's own index names its manifest. Twin: a base that is nowhere."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    tried = subprocess.run(["buildah", "info"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("buildah does not work here")
    digest = build.image(tmp_path, "Dockerfile", "fedtune-tried", tmp_path / "tried.oci.tar")
    with tarfile.open(tmp_path / "tried.oci.tar") as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        assert [each["digest"] for each in json.load(index)["manifests"]] == [digest]
    (tmp_path / "Dockerfile").write_text("FROM localhost/fedtune-no-such-base\n")
    with pytest.raises(NotReleasable, match="fedtune-tried"):
        build.image(tmp_path, "Dockerfile", "fedtune-tried", tmp_path / "no.oci.tar")
    subprocess.run(["buildah", "rmi", "localhost/fedtune-tried:release"], check=False)
