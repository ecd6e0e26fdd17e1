"""Start a fedtune process: only installed code runs, and no model hub is contacted.

`python -P boot.py MODULE OPTIONS` runs a module of this copy of fedtune in a process of its own.
The packages beside fedtune are found behind the standard library, and nothing is imported from
the current folder: a module beside a user's study.toml is never run, whatever its name.

Where the package `kernels` is installed, transformers and bitsandbytes fetch compiled kernels from
a hub when they are imported, and loaders ask the hub whether a cached file has changed. `cut_off`
prevents both: it runs before these packages are imported, in this process and in every child. The
hub is contacted only to fetch a base that a person named (core/bases/find.py)."""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_CORE = os.path.dirname(os.path.realpath(__file__))
PACKAGES = os.path.dirname(os.path.dirname(_CORE))  # the folder that holds fedtune
STANDARD = os.path.dirname(os.__file__)


def command(module: str, *options: str) -> list[str]:
    """Return the command line that runs `module` as __main__ in a process of its own, with these
    options. Start it with the variables that `environment` returns."""
    return [sys.executable, "-P", __file__, module, *options]


def environment() -> dict[str, str]:
    """Return this process's environment without import paths that reach the current folder."""
    current = os.path.realpath(os.curdir)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    allowed = [path for path in paths if os.path.isabs(path) and os.path.realpath(path) != current]
    safe = {"PYTHONPATH": os.pathsep.join(allowed), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **safe}


def collect_rarely() -> None:
    """Make Python's garbage collector search all objects of this process for unreachable cycles
    seldom, and not at all when the process ends. Young objects are searched as often as before.

    PyTorch, transformers and SciPy create some 400,000 objects that live as long as the process.
    While they are imported, Python would search all of them some twenty times, and three times at
    the end: 2 of the 6 seconds that a process takes to start and to end. So code must close an open
    file that is part of such a cycle: what the file still has to write is not written when the
    process ends."""
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, SEARCHES)
    atexit.register(gc.freeze)


def main() -> None:
    collect_rarely()
    standard = (STANDARD, os.path.join(STANDARD, "lib-dynload"))
    behind = max(n for n, folder in enumerate(sys.path, 1) if folder in standard)
    sys.path = [*sys.path[:behind], PACKAGES, *sys.path[behind:]]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


SEARCHES = 100  # searches of the middle generation before one of all objects; Python's own: 10
SPINS = "10000"  # half a millisecond or so


def limit_spinning() -> None:
    """Let a thread that waits for others in a matrix product spin for a moment only, then sleep.

    GNU OpenMP lets it spin for some 15 ms, which costs several times the product itself if other
    programs need the cores. A user who sets OMP_WAIT_POLICY or GOMP_SPINCOUNT keeps that setting.
    This has no effect if PyTorch was imported before fedtune."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


CPU_INFO = Path("/proc/cpuinfo")
REPRODUCIBLE = ("AVX2,STRICT", "AVX512,STRICT")  # a user's settings of MKL_CBWR that are kept


def fix_products() -> None:
    """Let MKL, by which PyTorch multiplies matrices, compute each row of a product by the same
    operations wherever the row lies in its matrix. By default MKL does not do so on some Intel
    processors: in products of one to three columns, as for a reward head, two classes or an adapter
    of rank 1 to 3, a row's last digit followed from its place, and so from which other rows were
    there. On processors that are not Intel's the setting would choose slow instructions.

    Nothing relies on this setting: it has no effect on processors without AVX2, nor if MKL has
    already computed something in this process. Whether rows keep their digits is tried for each
    network (core/models/places.py); if not, each record is computed by itself, which is slower.

    A user's own setting of MKL_CBWR is kept if it has the same effect. Reference: Intel oneMKL
    Developer Guide, "Obtaining Numerically Reproducible Results", strict conditional numerical
    reproducibility."""
    if os.environ.get("MKL_CBWR", "") in REPRODUCIBLE:
        return
    with suppress(OSError):
        if "GenuineIntel" in CPU_INFO.read_text(encoding="utf-8", errors="replace"):
            os.environ["MKL_CBWR"] = "AUTO,STRICT"


OURS = "FEDTUNE_OFFLINE"  # set where fedtune switched the hub off, not the user


def cut_off() -> None:
    """Switch off model hubs, and code from them, in this process and its children."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        os.environ[OURS] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # to import it is an error


QUANTISES = "bitsandbytes"
_hidden = False


def hide_quantisation() -> None:
    """Keep PEFT from importing bitsandbytes in this process until a plan quantises its base.
    Importing bitsandbytes loads PyTorch's compiler, some 570 modules that other studies never
    use."""
    global _hidden
    if QUANTISES not in sys.modules:
        sys.modules[QUANTISES] = None  # type: ignore[assignment]  # to import it is an error
        _hidden = True


def show_quantisation() -> None:
    """Undo `hide_quantisation`, even if PEFT has already looked for bitsandbytes. No effect if
    it was not hidden."""
    global _hidden
    if not _hidden:
        return
    del sys.modules[QUANTISES]
    _hidden = False
    from peft import import_utils

    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()


@contextmanager
def online() -> Iterator[None]:
    """Let this process reach the model hub within the block, unless the user set HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before and os.environ.get(OURS) != "1"
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


if __name__ == "__main__":
    main()
