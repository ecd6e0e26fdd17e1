"""Check the machine of a site or of a coordinator, for `fedtune doctor`: one function for each
check.

A check returns its finding as text, or raises a FedtuneError that says what is wrong and what to
do. Guarantee: nothing is created, fetched, changed or sent."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from safetensors import safe_open

from fedtune import __version__
from fedtune.core.bases.digest import weights
from fedtune.core.bases.find import verify
from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, ModelError
from fedtune.core.progress import report
from fedtune.core.wire.protocol import PROTOCOL

SHOWN = ("flwr", "torch", "transformers", "peft", "opacus")
OPEN = 0o077  # the mode bits that let other users in
ROOM = 1.5e9  # bytes of memory: Python, torch, transformers and Flower's processes
COPIES = 6  # adapters in memory: held, sent, received, summed, and the frozen half
FREE = 2e9  # bytes of disk: logs, the ledger, Flower's database
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
Check = Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """The finding of one check.

    - name: what was checked
    - good: whether the check passed
    - says: what the check found or, if it failed, the error's text. It must not leave this machine:
      a site's finding may hold counts of its records"""

    name: str
    good: bool
    says: str


def findings(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run the checks one after the other, and yield the Finding of each as soon as it ends. checks:
    pairs of a name and a function without arguments."""
    for name, check in checks:
        report(f"checking: {name}")
        try:
            yield Finding(name, True, check())
        except FedtuneError as error:
            yield Finding(name, False, str(error))


def versions() -> str:
    """List as text the versions of fedtune, its protocol, Python and the main libraries that are
    installed here. Errors: InfrastructureError if fedtune requires another version of a package."""
    installed = f"fedtune {__version__}, protocol {PROTOCOL}, python {platform.python_version()}"
    try:
        requirements = [Requirement(text) for text in metadata.requires("fedtune") or ()]
    except metadata.PackageNotFoundError:
        requirements = []
    shown = {name: _find_version(name) for name in SHOWN}
    for requirement in requirements:
        name, specifier = requirement.name, requirement.specifier
        version = _find_version(name)
        if requirement.marker is None and not specifier.contains(version or "0"):
            raise InfrastructureError(
                f"{installed}: {name} {version or 'is missing'}",
                f"{name}{specifier}",
                f"pip install '{name}{specifier}'",
            )
    return ", ".join([installed, *(f"{name} {version}" for name, version in shown.items())])


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def secrets(files: Iterable[Path]) -> str:
    """Check that no other user of this machine can read these secret files. A file that does not
    exist is passed over. Return a text with the number of files that exist. Errors: ConfigError if
    another user can read one of them."""
    existing = [path for path in files if path.exists()]
    for path in existing:
        if path.stat().st_mode & OPEN:
            raise ConfigError(
                f"{path}: other users can read it",
                "a file that only this user can read",
                "treat the secret in it as known to others, and replace it; if nobody else was on "
                "this machine, `chmod 600` is enough",
            )
    return f"{len(existing)} files, which only this user can read"


class Need(NamedTuple):
    """The memory in bytes that a study needs for its base and its adapter. The property `memory` is
    the whole need, with the programs and the copies of the adapter.

    - base: the base, counted as fp32 unless base.dtype is "bfloat16"
    - adapter: the adapter in fp32"""

    base: float
    adapter: float

    @property
    def memory(self) -> float:
        return ROOM + self.base + COPIES * self.adapter


def need(study: Study, folder: Path) -> Need:
    """Estimate the memory that a study's base and adapter need, from the headers of the base's
    files. The adapter is counted as if it were on every layer, so the estimate is an upper bound.
    folder: the base's folder. Errors: ModelError."""
    shapes, rank = list(_shapes(folder)), study.lora.rank if study.lora else 0
    ends = tuple(f"{name}.weight" for name in study.lora.modules) if study.lora else ()
    rows = sum(sum(shape) for name, shape in shapes if name.endswith(ends))
    width = 2 if study.base.dtype == "bfloat16" else 4
    return Need(width * sum(math.prod(shape) for _, shape in shapes), 4 * rank * rows)


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in weights(folder):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                yield name, file.get_slice(name).get_shape()


def base(study: Study, source: str | None = None) -> Path:
    """Find the folder of the study's base on this machine, and check the base's digest. source:
    where to look for it, as pypi:NAME, a folder or a hub id; None: base.model of the study. Errors:
    ModelError if the base is absent, or has another digest than the study names."""
    source_base = verify(source or study.base.model)
    if study.base.digest not in (None, source_base.digest):
        raise ModelError(
            f"{source_base.name}: the digest of the base here is {source_base.digest}",
            f"{study.base.digest}, as in the study",
            "use the copy that the study was made with, or start a new study with this one",
        )
    return source_base.path


def disk(folder: Path, least: float) -> str:
    """Check that at least `least` bytes are free on the disk of `folder`, and that this user can
    write there; `folder` need not exist yet. Return a text with the free and the wanted size.
    Errors: InfrastructureError if there is less, or the user cannot write there."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < least:
        raise InfrastructureError(
            f"{folder}: {_gb(free)} free",
            f"{_gb(least)} at least",
            "free disk space there, or use a folder on another disk",
        )
    if not os.access(folder, os.W_OK):
        raise InfrastructureError(f"{folder}: cannot be written", todo="fix its permissions")
    return f"{_gb(free)} free, {_gb(least)} wanted"


def memory(least: float) -> str:
    """Check that at least `least` bytes of memory are available. Return a text with the available
    and the wanted size. If the system does not say what is available, the check passes. Errors:
    InfrastructureError if there is less."""
    free = read_available_memory()
    if free is None:
        return f"{_gb(least)} wanted; this system does not say what is free"
    if free < least:
        raise InfrastructureError(
            f"{_gb(free)} of memory available",
            f"{_gb(least)} at least for this study's base and adapter",
            'end other programs, raise the container\'s limit, or set base.dtype = "bfloat16"',
        )
    return f"{_gb(free)} available, {_gb(least)} wanted"


def read_available_memory() -> float | None:
    """Return how many bytes of memory a new program can get on this machine, as the system reports
    it; in a container, no more than the container's limit leaves. None if the system does not
    say."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        return free if limit == "max" else min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        return free


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
