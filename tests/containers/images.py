"""The two images: built from the shipped Dockerfiles, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.containers.machine import Machine

IMAGES = {"fedtune-coordinator": "server/Dockerfile", "fedtune-site": "client/Dockerfile"}
CLOSED = ("--rm", "--read-only", "--cap-drop", "ALL", "--network", "none",
          "--security-opt", "no-new-privileges")  # fmt: skip
# What a program that got in would want, and what a build leaves behind.
ABSENT = ("pip", "gcc", "cc", "make", "git", "curl", "wget", "apt-get install")
LOOK = """
import importlib.util, os, shutil, stat, sys
found = [n for n in ("gcc", "cc", "make", "git", "curl", "wget", "pip", "pip3") if shutil.which(n)]
found += [n for n in ("pip", "ensurepip", "pytest", "tests") if importlib.util.find_spec(n)]
found += [p for p in ("/src", "/wheel", "/root/.cache/pip") if os.path.exists(p)]
found += [f"root: {os.getuid()}"] if os.getuid() == 0 else []
for where in ("/opt", "/usr/local", "/etc"):
    for folder, _, files in os.walk(where):
        for name in files:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISREG(mode) and (mode & stat.S_IWOTH or os.access(path, os.W_OK)):
                found.append(f"can be written: {path}")
print("\\n".join(found))
"""


def checks(machine: Machine) -> Iterator[str]:
    """Build what is not there yet; a line for each check that held."""
    for name, dockerfile in IMAGES.items():
        machine.build(name, dockerfile)
        facts = machine.inspect("image", name)
        config = facts["Config"]
        assert config["User"] == "10001:10001", config["User"]
        assert config["Entrypoint"] == ["fedtune"]
        assert not [v for v in config["Env"] if any(w in v for w in ("TOKEN", "SECRET", "PIP_"))]
        told = machine.podman("run", *CLOSED, "--entrypoint", "python", name, "-c", LOOK)
        assert told.strip() == "", told
        version = machine.podman("run", *CLOSED, "--tmpfs", "/tmp", name, "--version").strip()
        assert version.startswith("fedtune "), version
        yield f"{name}: {facts['Size'] / 1e6:,.0f} MB, {version}, no root, no pip, no compiler"
    machine.build("fedtune-fetch", "server/Dockerfile", "--target", "fetch")
    told = machine.podman(
        "run", "--rm", "--entrypoint", "python", "fedtune-fetch", "-c", LOOK
    )  # the twin: the stage that builds has pip and the source
    assert "pip" in told and "/src" in told, told
    yield "fedtune-fetch: the same look finds its pip"
