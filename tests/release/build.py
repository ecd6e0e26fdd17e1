"""Build the files of a release from one commit: wheel and sdist twice, the site, images."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from fedtune.core.errors import InputError

LOCKS = ("locks/build.txt", "locks/dev.txt", "locks/run.txt")
WHEN = 1580601600  # of the site's files: as hatchling writes into the wheel
IMAGES = {"fedtune-coordinator": "server/Dockerfile", "fedtune-site": "client/Dockerfile"}


class NotReleasable(InputError):
    """This tree cannot be released as it is."""


def git(root: Path, *words: str) -> bytes:
    """What git prints. Errors: NotReleasable where there is no clone, or no git."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"").decode().strip().partition("\n")[0]
        raise NotReleasable(f"{root}: no clone of the repository ({said or error})") from None
    return done.stdout


def clean_commit(root: Path) -> str:
    """The commit that lies there, and nothing beside it. Errors: NotReleasable."""
    dirty = git(root, "status", "--porcelain").decode().splitlines()
    if dirty:
        raise NotReleasable(
            f"{root}: not what its commit says ({len(dirty)} changed or new: "
            f"{', '.join(line[3:] for line in dirty[:3])})",
            "a clean clone",
            "commit, or clone anew and run make release there",
        )
    return git(root, "rev-parse", "HEAD").decode().strip()


def check_versions(root: Path) -> str:
    """The one version that every file of the tree gives. Errors: NotReleasable."""
    own, release = read_version(root), r"^## (\d+\.\d+\.\d+)"
    for name, pattern in (
        ("fedtune/__init__.py", r'^__version__ = "(.+)"'),
        ("CITATION.cff", r"^version: (.+)"),
        ("CHANGELOG.md", release),
    ):
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None or found[1] != own:
            said = found[1] if found else "none"
            raise NotReleasable(f"{name}: version {said}", f"{own}, as in pyproject.toml")
    return own


def read_version(root: Path) -> str:
    return str(_project(root)["version"])


def repository(root: Path) -> str:
    """The repository's address as pyproject.toml gives it; "" while there is none."""
    return str(_project(root).get("urls", {}).get("Source", ""))


def _project(root: Path) -> dict[str, dict[str, str]]:
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    return dict(tomllib.loads(text)["project"])


def check_interface() -> None:
    """Errors: NotReleasable where tests/formats/interface.json is not of this code."""
    from tests.formats import interface  # it needs what `make install` brings; a check does not

    release, entries = interface.kept()
    if entries != interface.interface() or release != read_version(interface.reference.ROOT):
        raise NotReleasable(
            f"{interface.KEPT.name}: of another state of the code",
            "what this release has",
            "python -m tests.formats.interface, and commit it",
        )


def materials(root: Path) -> dict[str, bytes]:
    """The locks by which the build is held."""
    return {name: (root / name).read_bytes() for name in LOCKS}


def builders(root: Path) -> dict[str, str]:
    """name -> version of the packages of locks/build.txt, as they are installed here.

    Errors: NotReleasable where another version is."""
    text = (root / "locks" / "build.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("--hash")[0] for line in text.splitlines() if not line.startswith("#")]
    found = {}
    for requirement in map(Requirement, filter(str.strip, lines)):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        here = importlib.metadata.version(requirement.name)
        if not requirement.specifier.contains(here):
            wanted = f"{requirement.name}{requirement.specifier}, as in locks/build.txt"
            raise NotReleasable(f"{requirement.name} {here} is installed", wanted, "make install")
        found[requirement.name] = here
    return found


def build_twice(root: Path, commit: str, dist: Path) -> list[Path]:
    """Build the wheel and the source archive from the commit alone, at two places with other times
    and modes, and the wheel once more from the source archive; put them in `dist`.

    Errors: NotReleasable where the bytes differ."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        first = build(lay(root, commit, folder / "a", 0o022), folder / "dist-a")
        second = build(lay(root, commit, folder / "elsewhere" / "b", 0o077), folder / "dist-b")
        if first != second:
            raise NotReleasable(f"{commit}: two builds gave other bytes", "the same bytes")
        (archive,) = (body for name, body in first.items() if name.endswith(".tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder / "c", filter="data")
        (unpacked,) = (folder / "c").iterdir()
        third = build(unpacked, folder / "dist-c")
        wheel = next(name for name in first if name.endswith(".whl"))
        if third[wheel] != first[wheel]:
            raise NotReleasable(f"{wheel}: other bytes from the sdist", "the same bytes")
    for name, body in first.items():
        (dist / name).write_bytes(body)
    return [dist / name for name in sorted(first)]


def lay(root: Path, commit: str, folder: Path, umask: int) -> Path:
    """Lay out a commit, and nothing that git ignores."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "--format=tar", commit))) as tar:
        for member in tar:
            member.mode &= ~umask
            member.mtime += umask  # another umask, another time
            tar.extract(member, folder, filter="data")
    return folder


def build(source: Path, out: Path) -> dict[str, bytes]:
    """The files of one build, as `make dist` makes them. Errors: NotReleasable."""
    environment = {key: v for key, v in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    words = [sys.executable, "-m", "hatchling", "build", "--directory", str(out)]
    done = subprocess.run(words, cwd=source, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise NotReleasable(f"the build failed: {done.stderr[-400:]}")
    return {path.name: path.read_bytes() for path in out.iterdir()}


def pack(folder: Path, to: Path) -> Path:
    """Write a folder as an archive, the same bytes each time."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in _files(folder):
            about = tarfile.TarInfo(f"{to.name.removesuffix('.tar.gz')}/{path.relative_to(folder)}")
            content = path.read_bytes()
            about.size, about.mtime, about.mode = len(content), WHEN, 0o644
            tar.addfile(about, io.BytesIO(content))
    to.write_bytes(gzip.compress(body.getvalue(), mtime=WHEN))
    return to


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def images(root: Path, commit: str, dist: Path, version: str, python: str) -> dict[str, str]:
    """Build the images from the commit, as archives in `dist`; name -> digest of its manifest, by
    which a registry serves the same image. python: the image below, "" for the Dockerfiles' own.

    Errors: NotReleasable, with what was said, where an image cannot be built here."""
    if shutil.which("buildah") is None:
        raise NotReleasable("buildah is not here")
    found = {}
    with tempfile.TemporaryDirectory() as held:
        tree = lay(root, commit, Path(held) / "tree", 0o022)
        for name, file in IMAGES.items():
            found[name] = image(tree, file, name, dist / f"{name}-{version}.oci.tar", python)
    (dist / "images.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def image(tree: Path, file: str, name: str, archive: Path, python: str = "") -> str:
    """Build one image into an archive; the digest of its manifest. Errors: NotReleasable."""
    tag, digest = f"localhost/{name}:release", archive.with_suffix(".digest")
    below = ("--build-arg", f"PYTHON_IMAGE={python}") if python else ()
    about = ("--timestamp", str(WHEN), "--format", "oci", "--file", file, "--tag", tag)
    for words in (
        ("bud", *below, *about, "."),
        ("push", "--digestfile", str(digest), tag, f"oci-archive:{archive}:{name}"),
    ):
        done = subprocess.run(["buildah", *words], cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise NotReleasable(f"{name}: {done.stderr.strip().splitlines()[-1][:160]}")
    said = digest.read_text().strip()
    digest.unlink()
    return said
