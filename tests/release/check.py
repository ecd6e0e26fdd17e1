"""Whether the files of a release are what they say: sums, statement, signature, and the tree.

python -m tests.release --check dist [--fingerprint HEX]     # in a clone, or in the sdist itself

what                              | compared with
SHA256SUMS                        | every file that lies there
the statement's subjects          | the same files
the envelope's signature          | the key, and that with --fingerprint
the wheel                         | its RECORD and the sdist, file by file; and built again from
                                  | the sdist, where the hatchling that built it is installed
the sdist, file by file           | the commit that the statement names, in a clone of it
the bill of materials             | the wheel's name and version
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from tests.release import build, statement
from tests.release.statement import NotAsReleased

SUMS = "SHA256SUMS"
KEY = "fedtune-release.pub"
IMAGES = "images.json"  # name -> digest, of images that were built
UNSIGNED, SIGNED, BILL = ".provenance.json", ".intoto.jsonl", ".cdx.json"
MANUAL, IN_DATA = "docs/fedtune.1", ".data/data/share/man/man1/fedtune.1"  # and in the wheel
_ABOUT = re.compile(r"[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/.+)")
TODO = "take no file of this release"


def check(dist: Path, root: Path, wanted: str = "") -> Iterator[str]:
    """Yield a line for each thing that was found right. root: a clone, or else the sdist's folder;
    wanted: the fingerprint that the project publishes, or "". Errors: NotAsReleased."""
    files = {path.name: path for path in sorted(dist.iterdir())}
    yield f"{_check_sums(files)} files: sums"
    said = yield from _signed(files, wanted)
    _check_subjects(statement.subjects_of(said), files)
    yield "the statement is of these files"
    wheel = _one(files, ".whl")
    source = _unpacked(files[_one(files, ".tar.gz", "site")].read_bytes())
    yield f"{wheel}: {_check_wheel(files[wheel].read_bytes(), source)} files, as in the sdist"
    commit, builders = statement.origin(said)
    yield _built_again(files, wheel, builders)
    tree = _tree(root, commit)
    if tree is None:
        yield f"the source archive was not compared with commit {commit}: it is in no clone here"
    else:
        compared = _check_tree(source, tree)
        yield f"the source archive: {compared} files, as in commit {commit}"
    bill = _json(files[_one(files, BILL)].read_bytes())["metadata"]["component"]
    if f"{bill['name']}-{bill['version']}-" not in wheel:
        raise NotAsReleased("the bill of materials is of something else", wheel, TODO)
    yield "the bill of materials is of this version"


Files = dict[str, Path]  # by name


def digest_of(path: Path) -> str:
    """SHA-256 of a file, which may be an image's archive, without reading it whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(files: Files, name: str) -> bytes:
    return files[name].read_bytes() if name in files else b""


def _check_sums(files: Files) -> int:
    lines = _content(files, SUMS).decode(errors="replace").splitlines()
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {name: digest_of(path) for name, path in files.items() if name != SUMS}
    differ = sorted(name for name in said.keys() | found if said.get(name) != found.get(name))
    if differ or not said:
        raise NotAsReleased(f"{', '.join(differ) or SUMS}: not as in {SUMS}", todo=TODO)
    return len(said)


def _signed(files: Files, wanted: str) -> Generator[str, None, dict[str, Any]]:
    """Return the statement, and say by whom it is signed."""
    envelopes = [name for name in files if name.endswith(SIGNED)]
    if not envelopes:
        if wanted:
            raise NotAsReleased("nobody signed this release", f"a signature by {wanted}", TODO)
        yield "NOT SIGNED: whoever can change these files can change their sums"
        return _json(_content(files, _one(files, UNSIGNED)))
    key = statement.public_key(_content(files, KEY))
    body = statement.opened(_content(files, _one(files, SIGNED)), key)
    own = statement.fingerprint(key)
    if wanted and own != wanted:
        raise NotAsReleased(f"signed by {own}", f"a signature by {wanted}", TODO)
    told = "as you asked" if wanted else "compare it with what the project publishes elsewhere"
    yield f"signed by {own}: {told}"
    return _json(body)


def _check_subjects(subjects: dict[str, str], files: Files) -> None:
    for name, path in files.items():
        about = name in (SUMS, KEY) or name.endswith((UNSIGNED, SIGNED))
        if not about and subjects.get(name) != digest_of(path):
            raise NotAsReleased(f"{name}: not as in the statement of the build", todo=TODO)
    images = _json(_content(files, IMAGES) or b"{}")
    for name, digest in subjects.items():
        if name not in files and images.get(name) != f"sha256:{digest}":
            raise NotAsReleased(f"{name}: in the statement, and not here", todo=TODO)


def _check_wheel(body: bytes, source: dict[str, bytes]) -> int:
    with zipfile.ZipFile(io.BytesIO(body)) as wheel:
        members = {name: wheel.read(name) for name in wheel.namelist()}
    record = next(name for name in members if name.endswith(".dist-info/RECORD"))
    for line in members[record].decode().splitlines():
        name, digest, _ = line.rsplit(",", 2)
        if name != record and _record_hash(members.get(name, b"")) != digest:
            raise NotAsReleased(f"{name}: not as in the wheel's RECORD", todo=TODO)
    shipped = {name: content for name, content in members.items() if name.startswith("fedtune/")}
    for name in members.keys() - shipped.keys():
        if name.endswith(IN_DATA):
            shipped[MANUAL] = members[name]
        elif not _ABOUT.fullmatch(name):
            raise NotAsReleased(f"{name}: does not belong into the wheel", todo=TODO)
    wanted = {name for name in source if name.startswith("fedtune/")} | {MANUAL}
    differ = sorted(n for n in wanted | shipped.keys() if shipped.get(n) != source.get(n))
    if differ:
        raise NotAsReleased(f"{', '.join(differ[:5])}: not as in the source archive", todo=TODO)
    return len(shipped)


def _built_again(files: Files, wheel: str, builders: set[str]) -> str:
    """Build the wheel from the sdist. Errors: NotAsReleased where it has other bytes."""
    try:
        here = f"pkg:pypi/hatchling@{importlib.metadata.version('hatchling')}"
    except importlib.metadata.PackageNotFoundError:
        here = "no hatchling"
    if here not in builders:
        return f"{wheel}: NOT built again here ({here}; the statement names another)"
    with tempfile.TemporaryDirectory() as held:
        with tarfile.open(files[_one(files, ".tar.gz", "site")]) as tar:
            tar.extractall(held, filter="data")
        (source,) = Path(held).iterdir()
        if build.build(source, source / "dist").get(wheel) != files[wheel].read_bytes():
            raise NotAsReleased(f"{wheel}: other bytes when built from the sdist", todo=TODO)
    return f"{wheel}: the same bytes when built again from the sdist"


def _record_hash(body: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(body).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def _check_tree(source: dict[str, bytes], tree: dict[str, bytes]) -> int:
    """The sdist is the commit, but for PKG-INFO, which the build writes, and what serves a host of
    repositories alone."""
    found = {name: body for name, body in source.items() if name != "PKG-INFO"}
    wanted = {name for name in tree if not name.startswith((".ci/", ".github/"))}
    differ = sorted(name for name in wanted | found.keys() if tree.get(name) != found.get(name))
    if differ:
        raise NotAsReleased(f"{', '.join(differ[:5])}: not as in the commit", todo=TODO)
    return len(found)


def _tree(root: Path, commit: str) -> dict[str, bytes] | None:
    """Every file of a commit; None where `root` is no clone that has it."""
    words = ["git", "-C", str(root), "archive", "--format=tar", commit]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return _members(done.stdout) if done.returncode == 0 else None


def _unpacked(body: bytes) -> dict[str, bytes]:
    """The files of a source archive, without its one folder."""
    return {name.partition("/")[2]: content for name, content in _members(body).items()}


def _members(body: bytes) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                found[member.name] = file.read()
    return found


def _one(files: Files, ending: str, without: str = "\0") -> str:
    """The one file's name that ends so. Errors: NotAsReleased."""
    found = [name for name in files if name.endswith(ending) and without not in name]
    if len(found) != 1:
        raise NotAsReleased(f"{len(found)} files end with {ending}", "one", TODO)
    return found[0]


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        raise NotAsReleased("a JSON file cannot be read", todo=TODO) from None
    if not isinstance(found, dict):
        raise NotAsReleased("a JSON file is no table", todo=TODO)
    return found
