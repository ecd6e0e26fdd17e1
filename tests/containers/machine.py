"""Debian's buildah and podman where there is no Docker engine and no image registry.

Everything lies in one folder: storage, the base image's files, a copy of the source tree. Nothing
of the machine's own containers is read or changed. The shipped Dockerfiles need none of this."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = ("buildah", "podman", "podman-compose", "runc", "debootstrap", "nft")
APT = (
    "buildah podman runc podman-compose netavark aardvark-dns catatonit iptables nftables "
    "debootstrap"
)
# What CPython's own modules link to. The interpreter is the one that runs this: for it the machine
# may have a CPU build of torch, which the package index does not.
LIBRARIES = (
    *("ca-certificates", "libssl3t64", "libffi8", "libsqlite3-0", "libbz2-1.0", "liblzma5"),
    *("libreadline8t64", "libuuid1", "zlib1g", "libexpat1", "libncursesw6"),
)
CERTIFICATES = "/etc/ssl/certs"
BASE = "localhost/python-base"
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nproc=90000:90000", "nofile=1024:4096"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
compose_warning_logs = false
"""
STORAGE_CONF = """
[storage]
driver = "{1}"
graphroot = "{0}/storage"
runroot = "{0}/run"
"""


class Machine:
    """The containers of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        folder.mkdir(parents=True, exist_ok=True)
        driver = "overlay" if _overlays(folder) else "vfs"  # vfs copies an image for every layer
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        (folder / "storage.conf").write_text(STORAGE_CONF.format(folder, driver))
        self.links = _find_links()
        pip = ["[global]", f"cert = {CERTIFICATES}/ca-certificates.crt"]
        pip += [f"find-links = {where}" for where in self.links]
        (folder / "pip.conf").write_text("\n".join(pip) + "\n")
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            "TMPDIR": str(folder / "tmp"),
        }
        (folder / "tmp").mkdir(exist_ok=True)

    def run(
        self,
        *words: object,
        cwd: Path | None = None,
        fails: bool | None = False,
        seconds: float = 3600,
    ) -> str:
        """Run a command; what it printed. fails: whether it does; None: either. Errors:
        AssertionError where it ends otherwise."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=cwd or self.tree,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        told = f"{' '.join(map(str, words))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert fails is None or (done.returncode != 0) == fails, told
        return done.stdout if not fails else done.stdout + done.stderr

    def timed(self, what: str, *words: object) -> str:
        start = time.monotonic()
        said = self.run(*words)
        print(f"{time.monotonic() - start:7.1f} s  {what}", flush=True)
        return said

    def podman(self, *words: object, fails: bool | None = False) -> str:
        return self.run("podman", *words, fails=fails)

    def compose(self, *words: object) -> str:
        return self.run("podman-compose", "--no-ansi", *words)

    def copy_tree(self) -> None:
        """Lay out the working tree as a clone has it, without what Git ignores."""
        words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
        listed = subprocess.run([*words, "--exclude-standard"], capture_output=True, check=True)
        shutil.rmtree(self.tree, ignore_errors=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)

    def make_base(self) -> None:
        """Import the base image: Debian's minbase and this interpreter, under /usr/local."""
        if subprocess.run(
            ["podman", "image", "exists", BASE], env=self.environment, cwd=self.folder
        ).returncode == 0:  # fmt: skip
            return
        root = self.folder / "base"
        if not (root / "etc/debian_version").exists():
            include = ",".join(LIBRARIES)
            words = ["debootstrap", "--variant=minbase", f"--include={include}", "trixie"]
            self.timed("debootstrap", *words, root, _mirror())
            shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
            shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
        skip = shutil.ignore_patterns("__pycache__", "test", "tests", "site-packages", "*.a")
        for part in ("bin", "lib", "include"):
            where = root / "usr/local" / part
            shutil.rmtree(where, ignore_errors=True)
            shutil.copytree(Path(sys.base_prefix) / part, where, symlinks=True, ignore=skip,
                            dirs_exist_ok=True)  # fmt: skip
        (root / f"usr/local/lib/python3.{sys.version_info.minor}/site-packages").mkdir(
            exist_ok=True
        )
        for script in (root / "usr/local/bin").glob("pip*"):
            script.unlink()
        pip = (
            f"cd /usr/local/bin && ln -sf python3.{sys.version_info.minor} python && ldconfig && "
            "python -m ensurepip && ln -sf pip3 pip"
        )
        self.run("chroot", root, "/bin/sh", "-c", pip, cwd=self.folder)
        archive = self.folder / "base.tar"
        self.run("tar", "-C", root, "-cf", archive, ".", cwd=self.folder)
        self.timed("base image", "podman", "import", archive, BASE)
        archive.unlink()

    def build(self, image: str, dockerfile: str, *more: str, what: str = "") -> None:
        """Build one of the shipped Dockerfiles as it is, with its build arguments alone."""
        mounts = [CERTIFICATES, *self.links]
        volumes = [word for m in mounts for word in ("-v", f"{m}:{m}:ro")]
        volumes += ["-v", f"{self.folder}/pip.conf:/etc/pip.conf:ro"]
        self.timed(
            what or f"build {image}",
            *("buildah", "bud", "--isolation", "chroot", "--layers", "--format", "docker"),
            *("--ulimit", "nproc=90000:90000", *volumes, "--build-arg", f"PYTHON_IMAGE={BASE}"),
            *("--build-arg", "TORCH_INDEX=https://pypi.org/simple"),
            *(*more, "-f", dockerfile, "-t", image, "."),
        )  # fmt: skip

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.podman(kind, "inspect", name))
        return found[0]


def _overlays(folder: Path) -> bool:
    """Whether this file system lies under an overlay."""
    parts = [folder / "try" / name for name in ("lower", "upper", "work", "over")]
    for part in parts:
        part.mkdir(parents=True, exist_ok=True)
    lower, upper, work, over = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    words = ["mount", "-t", "overlay", "overlay", "-o", options, str(over)]
    works = subprocess.run(words, capture_output=True).returncode == 0
    if works:
        subprocess.run(["umount", str(over)], check=True)
    shutil.rmtree(folder / "try")
    return works


def _find_links() -> list[str]:
    """The folder of wheels that this machine's pip looks into, where it has one."""
    words = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.split()


def _mirror() -> str:
    """Debian's mirror that this machine uses."""
    for file in sorted(Path("/etc/apt").rglob("*.sources")):
        for line in file.read_text().splitlines():
            if line.startswith("URIs: http"):
                return line.split()[1]
    return "http://deb.debian.org/debian"


def missing() -> list[str]:
    return [name for name in NEEDED if shutil.which(name) is None]
