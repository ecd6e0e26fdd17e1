"""The images, built and run as docker-compose.yml says: python -m tests.containers (as root).

    1. both images are built from the shipped Dockerfiles, and looked into
    2. a coordinator and three sites enrol in closed containers
    3. a private study to its end, one site by a spool, one without namespaces: each round is
       charged once, and each half is confined as it says
    4. a longer study with σ = 0: a site is killed, then the coordinator; both are started again
    5. a site and the coordinator go on from the next release's images, in the middle of the study
    6. the adapter is that of `simulate`; no packet left the internal networks

FEDTUNE_CONTAINERS: a folder to work in; what is built there is used again."""

from __future__ import annotations

import os
import sys
import time
from itertools import chain
from pathlib import Path

from tests.containers import consortium, images
from tests.containers.machine import APT, Machine, missing


def main() -> int:
    if absent := missing():
        print(f"{', '.join(absent)}: not here; apt-get install --no-install-recommends {APT}")
        return 2
    start = time.monotonic()
    machine = Machine(Path(os.environ.get("FEDTUNE_CONTAINERS", "/var/tmp/fedtune-containers")))
    machine.copy_tree()
    machine.make_base()
    held = 0
    for check in chain(images.checks(machine), consortium.checks(machine)):
        held += 1
        print(f"ok  {check}", flush=True)
    print(f"{held} passed, 0 failed in {(time.monotonic() - start) / 60:.1f} min")
    return 0


if __name__ == "__main__":
    sys.exit(main())
