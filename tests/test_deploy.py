"""docker-compose.yml and the Dockerfiles, without Docker: schema, linter, rules, and real commands.

`problems` says what is wrong with a compose file; each rule has a twin that breaks it."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from fedtune.core.config import load_site, load_study
from tests.deploy_kit import DOCKERFILES, ROOT, Compose, Words, instructions

SITES = ("north", "south", "west")
COURIERS = {name: f"{name}-courier" for name in SITES}
WRITABLE = {  # what a service may write to, besides /tmp
    "coordinator": {"/coordinator", "/runs"},
    "models": {"/models"},
    "admit": {"/coordinator", *(f"/post/{name}" for name in SITES)},
    **{name: {"/site/state", "/run/fedtune"} for name in SITES},
    **{name: set() for name in COURIERS.values()},
    **{f"enrol-{name}": {"/site/post", "/site/state"} for name in SITES},
}


def mounts(service: Compose) -> Iterator[tuple[str, str, bool]]:
    """source, target, whether it is read-only."""
    for text in service.get("volumes", ()):
        source, target, *mode = text.split(":")
        yield source, target, mode == ["ro"]


def owner(source: str) -> str | None:
    """Whose data a host path is: a site's name, or None."""
    parts = PurePosixPath(source).parts
    return parts[1] if len(parts) > 1 and parts[0] == "deploy" and parts[1] in SITES else None


def default(text: str) -> str:
    """A value as compose takes it where no variable is set."""
    return re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", str(text))


def problems(compose: Compose) -> list[str]:
    found = [
        f"{name}: {rule}" for name, s in compose["services"].items() for rule in closed(name, s)
    ]
    found += [f"{name}: {rule}" for name in SITES for rule in alone(compose, name)]
    return found + list(kept(compose))


def closed(name: str, s: Compose) -> Iterator[str]:
    """What holds for every container."""
    if s.get("read_only") is not True:
        yield "its root can be written"
    if not any(
        t.startswith("/tmp:") and "noexec" in t and "size=" in t for t in s.get("tmpfs", ())
    ):
        yield "no bounded /tmp"
    user = default(s.get("user", "root")).split(":")
    if len(user) != 2 or not all(part.isdigit() and int(part) for part in user):
        yield "runs as root"
    if s.get("cap_drop") != ["ALL"] or "cap_add" in s:
        yield "keeps capabilities"
    if s.get("security_opt") != ["no-new-privileges:true"]:
        yield "may gain privileges"
    for key in ("privileged", "pid", "ipc", "devices", "userns_mode", "volumes_from", "group_add"):
        if key in s:
            yield f"has {key}"
    if s.get("network_mode") not in (None, "none"):
        yield "shares a network of the host or of a container"
    if "ports" in s:
        yield "publishes a port"
    writable = {target for _, target, read_only in mounts(s) if not read_only}
    if not writable <= WRITABLE.get(name, set()):
        yield "writes where it need not"
    if any("docker.sock" in source for source, _, _ in mounts(s)):
        yield "holds Docker itself"
    if any(re.search("KEY|SECRET|TOKEN|PASS", key) for key in s.get("environment", {})):
        yield "has a secret in its environment"


def alone(compose: Compose, name: str) -> Iterator[str]:
    """What keeps a site to itself, and its records from the network."""
    services, nets = compose["services"], compose["networks"]
    site, courier = services[name], services[COURIERS[name]]
    if site.get("network_mode") != "none" or "networks" in site:
        yield "its records are on a network"
    if courier.get("networks") != [name]:
        yield "is on another network than its own"
    elif (nets[name] or {}).get("internal") is not True:
        yield "its network reaches outside"
    there = {n for n, s in services.items() if name in s.get("networks", ())}
    if there != {COURIERS[name], "coordinator"}:
        yield "somebody else is on its network"
    for service in (name, COURIERS[name], f"enrol-{name}"):
        sources = [source for source, _, _ in mounts(services[service])]
        if any(source.startswith(".") and owner(source) != name for source in sources):
            yield "mounts what is not its own"
    of_courier = {source.removeprefix(f"./deploy/{name}/") for source, _, _ in mounts(courier)}
    if of_courier != {"site.toml", "post", "state/keys", f"{name}-socket"}:
        yield "its courier sees more, or less, than it needs"
    meet = {n for n, s in services.items() if f"{name}-socket" in [m[0] for m in mounts(s)]}
    if meet != {name, COURIERS[name]}:
        yield "somebody else is at its socket"
    if "expose" in site or "expose" in courier:
        yield "listens"


def kept(compose: Compose) -> Iterator[str]:
    """Secrets, data, health and restarts."""
    services, files = compose["services"], compose["secrets"]
    secrets = services["coordinator"]["secrets"]
    given = {secret["target"]: files[secret["source"]] for secret in secrets}
    if set(given) != {"/coordinator/ca.pem", "/coordinator/signing.key"}:
        yield "coordinator: its private keys are not secrets"
    mounted = {target: source for source, target, _ in mounts(services["coordinator"])}
    for target, where in given.items():
        folder = max((t for t in mounted if target.startswith(t + "/")), key=len, default="")
        if where.get("file") != mounted.get(folder, "") + target.removeprefix(folder):
            yield f"coordinator: the secret {target} is another file than was written"
    for name in ("coordinator", *SITES, *COURIERS.values()):
        if services[name].get("restart") not in ("unless-stopped", "on-failure"):
            yield f"{name}: stays down after a crash"
        if services[name].get("healthcheck", {}).get("test", [""])[0] != "CMD":
            yield f"{name}: no health check"
    for name in ("coordinator", "admit"):
        for source, _, _ in mounts(services[name]):
            if (whose := owner(source)) and (name, PurePosixPath(source).name) != ("admit", "post"):
                yield f"{name}: sees what is {whose}'s"
    for name, service in services.items():
        if name not in ("coordinator", *SITES, *COURIERS.values()) and not service.get("profiles"):
            yield f"{name}: starts with the others"


def test_the_compose_file_is_one_by_the_specifications_own_schema(compose: Compose) -> None:
    import jsonschema  # which takes two seconds, in every process that collects the tests

    schemas = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text(encoding="utf-8"))
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(compose)
    compose["services"]["north"]["helthcheck"] = {}  # the twin: the schema does look
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(compose)


def test_the_compose_file_keeps_every_rule(compose: Compose) -> None:
    assert problems(compose) == []
    assert set(WRITABLE) == set(compose["services"])


def _drop(*path: str) -> Callable[[Compose], None]:
    def change(compose: Compose) -> None:
        for key in path[:-1]:
            compose = compose[key]
        del compose[path[-1]]

    return change


def _put(value: Any, *path: str) -> Callable[[Compose], None]:
    def change(compose: Compose) -> None:
        for key in path[:-1]:
            compose = compose[key]
        compose[path[-1]] = value

    return change


def _add(value: str, *path: str) -> Callable[[Compose], None]:
    def change(compose: Compose) -> None:
        for key in path[:-1]:
            compose = compose[key]
        compose[path[-1]] = [*compose.get(path[-1], []), value]

    return change


S = "services"
DATA = "./deploy/north/data:/data:ro"
STATE, SOCKET = "./deploy/north/state:/state:ro", "north-socket:/run/north:ro"
WRITES = ["./deploy/north/state/keys:/site/state/keys"]
TWINS: list[tuple[str, Callable[[Compose], None]]] = [
    ("coordinator: its root can be written", _drop(S, "coordinator", "read_only")),
    ("north: no bounded /tmp", _put(["/tmp"], S, "north", "tmpfs")),
    ("north: runs as root", _drop(S, "north", "user")),
    ("north: runs as root", _put("${FEDTUNE_UID:-0}:10001", S, "north", "user")),
    ("admit: keeps capabilities", _put(["NET_RAW"], S, "admit", "cap_drop")),
    ("south: keeps capabilities", _put(["NET_ADMIN"], S, "south", "cap_add")),
    ("west: may gain privileges", _drop(S, "west", "security_opt")),
    ("west: has privileged", _put(True, S, "west", "privileged")),
    ("north: shares a network of", _put("host", S, "north", "network_mode")),
    ("north: publishes a port", _put(["9464:9464"], S, "north", "ports")),
    ("north: writes where", _add("./deploy/north/data:/site/data", S, "north", "volumes")),
    ("models: holds Docker", _add("/var/run/docker.sock:/d:ro", S, "models", "volumes")),
    ("north: has a secret in", _put({"NODE_KEY": "x"}, S, "north", "environment")),
    ("north: is on another network", _put(["north", "south"], S, "north-courier", "networks")),
    ("north: its records are on a network", _put(["north"], S, "north", "networks")),
    ("south: its records are on a network", _drop(S, "south", "network_mode")),
    ("north: its courier sees more", _add(DATA, S, "north-courier", "volumes")),
    ("north: its courier sees more", _add(STATE, S, "north-courier", "volumes")),
    ("north: somebody else is at its socket", _add(SOCKET, S, "south-courier", "volumes")),
    ("north-courier: writes where", _put(WRITES, S, "north-courier", "volumes")),
    ("north: its network reaches", _put({}, "networks", "north")),
    ("north: somebody else", _put(["south", "north"], S, "south-courier", "networks")),
    ("north: mounts what", _add("./deploy/south/data:/other:ro", S, "north", "volumes")),
    ("north: mounts what", _add("./deploy/south/data:/other:ro", S, "enrol-north", "volumes")),
    ("west: listens", _put(["8080"], S, "west", "expose")),
    ("coordinator: its private keys are not", _put([], S, "coordinator", "secrets")),
    ("coordinator: the secret", _put({"file": "./ca.pem"}, "secrets", "coordinator-ca")),
    ("coordinator: the secret", _put({"environment": "KEY"}, "secrets", "coordinator-ca")),
    ("coordinator: stays down", _drop(S, "coordinator", "restart")),
    ("south: no health check", _put({"disable": True}, S, "south", "healthcheck")),
    ("coordinator: sees what is north's", _add(DATA, S, "coordinator", "volumes")),
    (
        "coordinator: sees what is north's",
        _add("./deploy/north:/n:ro", S, "coordinator", "volumes"),
    ),
    ("admit: sees what is north's", _add(DATA, S, "admit", "volumes")),
    ("admit: starts with the others", _drop(S, "admit", "profiles")),
]


@pytest.mark.parametrize(("says", "change"), TWINS)
def test_twin_a_compose_file_that_breaks_a_rule_is_caught(
    compose: Compose, says: str, change: Callable[[Compose], None]
) -> None:
    broken = copy.deepcopy(compose)
    change(broken)
    assert any(problem.startswith(says) for problem in problems(broken)), problems(broken)


def test_what_the_example_files_name_is_mounted_where_they_name_it(compose: Compose) -> None:
    study = load_study(ROOT / "deploy/study/study.toml")
    assert study.private and study.base.digest
    for name in SITES:
        folder = ROOT / "deploy" / name
        site = load_site(folder / "site.toml")
        assert site.site.name == name and site.coordinator
        by_target = {t: read_only for _, t, read_only in mounts(compose["services"][name])}
        for path, read_only in (
            (site.site.state, False),
            (site.data.path.parent, True),
            (site.coordinator.answer.parent, True),
        ):
            assert by_target[f"/site/{path.relative_to(folder)}"] is read_only


def last_stage(text: str) -> list[tuple[str, str]]:
    steps = instructions(text)
    return steps[max(i for i, (word, _) in enumerate(steps) if word == "FROM") :]


def flaws(text: str) -> list[str]:
    steps, stage = instructions(text), last_stage(text)
    runs = " ; ".join(rest for word, rest in stage if word == "RUN")
    stages = {rest.split(" AS ")[1] for word, rest in steps if word == "FROM" and " AS " in rest}
    images = [rest.split()[0] for word, rest in steps if word == "FROM"]
    rules = {
        "an image that no ARG pins": all(i == "${PYTHON_IMAGE}" or i in stages for i in images)
        and ("ARG", "PYTHON_IMAGE=python:3.11-slim-bookworm") in steps,
        "torch that no ARG pins": "torch==${TORCH_VERSION}" in text and "/whl/cpu" in text,
        "runs as root": [rest for word, rest in stage if word == "USER"][-1:] == ["10001:10001"],
        "pip stays": "pip uninstall" in runs and "ensurepip" in runs and "--without-pip" in text,
        "build tools": not re.search(r"\b(apt-get|apk|gcc|make|git|curl|pip3? install)\b", runs),
        "copies more than what was built": [rest for word, rest in stage if word == "COPY"]
        == ["--from=build /opt/fedtune /opt/fedtune"],
        "no health check": any(word == "HEALTHCHECK" and "CMD" in rest for word, rest in stage),
        "a shell stands before it": any(w == "ENTRYPOINT" and r.startswith("[") for w, r in stage),
        "a secret in a layer": not re.search(r"(?i)(arg|env) \w*(secret|token|password)", text),
        "fetches by URL": not any(word == "ADD" for word, _ in steps),
    }
    return [rule for rule, holds in rules.items() if not holds]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_passes_the_linter_and_our_rules(name: str, tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    text = (ROOT / name).read_text(encoding="utf-8")
    assert flaws(text) == []
    (tmp_path / "Dockerfile").write_text(text + "RUN sudo apt-get install gcc\n")  # the twin
    broken = subprocess.run([hadolint, tmp_path / "Dockerfile"], capture_output=True, text=True)
    assert broken.returncode != 0 and "DL3004" in broken.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
@pytest.mark.parametrize(
    ("says", "old", "new"),
    [
        ("an image that no ARG pins", "FROM ${PYTHON_IMAGE} AS run", "FROM python:latest AS run"),
        ("torch that no ARG pins", '"torch==${TORCH_VERSION}"', "torch"),
        ("runs as root", "USER 10001:10001\n", ""),
        ("pip stays", "pip uninstall", "pip list"),
        ("pip stays", " --without-pip", ""),
        ("build tools", "RUN python -m pip", "RUN apt-get install -y gcc && python -m pip"),
        ("copies more than", "COPY --from=build", "COPY . .\nCOPY --from=build"),
        ("no health check", "HEALTHCHECK", "LABEL"),
        ("a shell stands", 'ENTRYPOINT ["fedtune"]', "ENTRYPOINT fedtune"),
        ("a secret in a layer", "WORKDIR /src", "ARG PIP_TOKEN\nWORKDIR /src"),
        ("fetches by URL", "WORKDIR /src", "ADD https://example.org/a /a\nWORKDIR /src"),
    ],
)
def test_twin_a_dockerfile_that_breaks_a_rule_is_caught(
    name: str, says: str, old: str, new: str
) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert old in text
    assert any(flaw.startswith(says) for flaw in flaws(text.replace(old, new)))


def ignored(path: str, lines: Words) -> bool:
    """Whether .dockerignore keeps `path` out: the last line that matches it or a parent decides."""
    out = False
    parents = [
        str(PurePosixPath(*PurePosixPath(path).parts[: n + 1])) for n in range(path.count("/") + 1)
    ]
    for line in lines:
        pattern = line.removeprefix("!").removeprefix("**/")
        anywhere = line.removeprefix("!").startswith("**/")
        names = [p.rsplit("/", 1)[-1] if anywhere else p for p in parents]
        if any(fnmatch.fnmatchcase(n, pattern) for n in names):
            out = not line.startswith("!")
    return out


def test_the_build_context_holds_the_code_and_nothing_else() -> None:
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    code = [
        str(file.relative_to(ROOT))
        for package in ("fedtune", "server", "client")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    assert len(code) > 50
    for path in (*code, "pyproject.toml", "README.md", "LICENSE"):
        assert not ignored(path, lines), path
    for path in (
        *("deploy/north/data/data.jsonl", "deploy/coordinator/ca.pem", "runs/a/report.json"),
        *("data.jsonl", "client/data.jsonl", "client/state/ledger.db", "server/server.pem"),
        *(".git/config", "tests/test_deploy.py", "site.toml", "notes.csv", "fedtune/node.key"),
    ):
        assert ignored(path, lines), path
    assert not ignored("deploy/north/data/data.jsonl", [*lines, "!deploy"])  # the twin
