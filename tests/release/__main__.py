"""Make a release, sign one, or check one.

    python -m tests.release [--key FILE] [--builder URI]       # `make release`: from a clean clone
    python -m tests.release --sign dist --key FILE             # where the key is: builds nothing
    python -m tests.release --check dist [--fingerprint HEX]   # what anybody can do

Exit codes: 0: done; 2: something is not as it must be, and the last line says what.
docs/releasing.md says what each file is."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from fedtune.core.errors import FedtuneError
from tests.release import build, check, statement
from tests.release.build import NotReleasable

ROOT = Path(__file__).parents[2]
ROOM = ROOT / "build" / "clean-room"
LEFT = """
What a person must still do
  name        choose the name on the package index, and own it; pyproject.toml says fedtune
  address     when there is a repository's address: Source in [project.urls] of pyproject.toml
  changelog   put the day in place of "(unreleased)" in CHANGELOG.md, commit, and run this again
  tag         git tag --sign v{version} {commit}
  key         {key}
  upload      twine upload dist/*.whl dist/fedtune-{version}.tar.gz   (two-factor account, or the
              index's trusted publishing); every other file beside the release's notes
  images      {images}
  afterwards  a fresh machine: pip install fedtune=={version}, and python -m tests.release --check
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--key", type=Path, help=f"sign with {statement.A_KEY}")
    parser.add_argument("--builder", default=statement.BUILDER, help="URI of whose machine it is")
    parser.add_argument("--python-image", default="", help="of the images, as NAME@sha256:…")
    parser.add_argument("--sign", type=Path, metavar="DIST")
    parser.add_argument("--check", type=Path, metavar="DIST")
    parser.add_argument(
        "--fingerprint", default="", help="with --check: whose signature it must be"
    )
    given = parser.parse_args()
    try:
        if given.check:
            tell(given.check, given.fingerprint)
        elif given.sign:
            sign(given.sign, given.key)
        else:
            release(ROOT / "dist", given.key, given.builder, given.python_image)
    except FedtuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def release(dist: Path, key: Path | None, builder: str, python_image: str) -> None:
    """Make every file of a release in `dist`, which is emptied first. Errors: NotReleasable."""
    started = statement.now()
    commit, version = build.clean_commit(ROOT), build.check_versions(ROOT)
    build.check_interface()
    packages = build.builders(ROOT)
    if key is not None:
        statement.private_key(key)  # before all the work
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    print(f"fedtune {version}, commit {commit}")
    built = build.build_twice(ROOT, commit, dist)
    print(f"{', '.join(path.name for path in built)}: two builds, the same bytes")
    print(f"{make_site(dist, version).name}: the documentation")
    try_alone(dist)
    print(f"{make_bill(dist).name}: what the wheel brings")
    images, told = {}, ""
    try:
        images = build.images(ROOT, commit, dist, version, python_image)
    except NotReleasable as error:
        told = f"NOT BUILT here ({error}); docker build -f client/Dockerfile, server/Dockerfile"
    source = build.repository(ROOT)
    asked = {"version": version, "repository": source, "pythonImage": python_image}
    said = statement.make(
        {**sums(dist), **{name: digest.partition(":")[2] for name, digest in images.items()}},
        commit=commit,
        source=source,
        parameters={name: value for name, value in asked.items() if value},
        materials=build.materials(ROOT),
        packages=packages,
        builder=builder,
        started=started,
    )
    unsigned = dist / f"fedtune-{version}{check.UNSIGNED}"
    unsigned.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    write_sums(dist)
    if key is not None:
        sign(dist, key)
    else:
        tell(dist, "")
    by_digest = "skopeo copy --preserve-digests oci-archive:FILE docker://…; digests in images.json"
    print(LEFT.format(version=version, commit=commit, images=told or by_digest, key=about(key)))


def about(key: Path | None) -> str:
    if key is None:
        return (
            "THIS RELEASE IS NOT SIGNED. On a machine that has the key:\n"
            "              openssl genpkey -algorithm ed25519 -out release.pem  (once; chmod 600)\n"
            "              python -m tests.release --sign dist --key release.pem"
        )
    own = statement.fingerprint(statement.private_key(key).public_key())
    return f"publish its fingerprint where these files are not:\n              {own}"


def sums(dist: Path) -> dict[str, str]:
    """name -> SHA-256 of every file but the sums."""
    files = sorted(path for path in dist.iterdir() if path.name != check.SUMS)
    return {path.name: check.digest_of(path) for path in files}


def write_sums(dist: Path) -> None:
    lines = [f"{digest}  {name}\n" for name, digest in sums(dist).items()]
    (dist / check.SUMS).write_text("".join(lines), encoding="utf-8")


def make_site(dist: Path, version: str) -> Path:
    """Build the pages, and pack them. Errors: NotReleasable."""
    if not Path(sys.executable).with_name("zensical").exists():
        raise NotReleasable("zensical is not installed", "the extra [docs]", "make docs")
    from tests.docs import site  # it needs what `make install` brings; a check does not

    done = site.build(ROOT)
    if done.returncode:
        raise NotReleasable(f"the pages do not build: {done.stdout[-400:]}", todo="make docs")
    return build.pack(ROOT / "build" / "site", dist / f"fedtune-{version}-site.tar.gz")


def try_alone(dist: Path) -> None:
    """Let the clean room work from these files alone. Errors: NotReleasable."""
    words = ["-m", "tests.clean_room", "--dist", str(dist), "--keep", str(ROOM)]
    if subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        raise NotReleasable("a fresh machine cannot use these files", todo="read the lines above")


def make_bill(dist: Path) -> Path:
    """Write the bill of materials of the clean room. Errors: NotReleasable."""
    to = dist / f"fedtune{check.BILL}"
    words = ["cyclonedx-py", "environment", str(ROOM / "bin/python"), "--pyproject"]
    words += ["pyproject.toml", "--mc-type", "library", "--output-reproducible", "--output-file"]
    tool = Path(sys.executable).with_name(words[0])
    done = subprocess.run([tool, *words[1:], to], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise NotReleasable(f"no bill of materials: {done.stderr[-400:]}")
    return to


def sign(dist: Path, key: Path | None) -> None:
    """Check an unsigned release, put its statement in an envelope, and check that.

    Errors: NotReleasable, NotAsReleased."""
    if key is None:
        raise NotReleasable("no key to sign with", "--key FILE")
    own = statement.private_key(key)
    tell(dist, "")
    for unsigned in dist.glob(f"*{check.UNSIGNED}"):
        signed = unsigned.name.replace(check.UNSIGNED, check.SIGNED)
        (dist / signed).write_bytes(statement.sealed(unsigned.read_bytes(), own))
        unsigned.unlink()
    (dist / check.KEY).write_bytes(statement.as_pem(own.public_key()))
    write_sums(dist)
    tell(dist, statement.fingerprint(own.public_key()))


def tell(dist: Path, wanted: str) -> None:
    for line in check.check(dist, ROOT, wanted):
        print(f"ok  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
