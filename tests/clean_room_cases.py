"""One real case of every command, as it is typed in a folder that holds what `lay_out` writes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.clean_room import Room

# In the clean environment: shows every help, and prints the commands' names as JSON.
HELPED = """
import contextlib, io, json
import click, typer
from typer.testing import CliRunner
from fedtune.cli.main import app
def every(group, before=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every(command, (*before, name))
        else:
            yield (*before, name)
names = [words for words in every(typer.main.get_command(app))]
for words in names:
    done = CliRunner().invoke(app, [*words, "--help"])
    assert done.exit_code == 0 and "--help" in done.output, (words, done.output)
print(json.dumps([" ".join(words) for words in names]))
"""
STUDY = """
[study]
name = "tiny"
seed = 1
[base]
model = "./base"
dtype = "float32"
[lora]
rank = 2
alpha = 4
last_layers = 2
[objective]
name = "causal_lm"
max_length = 64
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
epsilon = 3.0
delta = 1e-3
unit = "patient"
[strategy]
min_sites = 1
round_timeout = 120
[evaluation]
path = "evaluation.jsonl"
metric = "accuracy"
choices = ["y", "n"]
columns = { prompt = "q", completion = "a" }
"""
DECLARED = STUDY.replace('name = "tiny"', 'name = "tried"')
DECLARED += '[selection]\npath = "selection.jsonl"\ncolumns = { prompt = "q", completion = "a" }\n'
PREFERENCES = (
    STUDY.replace('name = "tiny"', 'name = "liked"')
    .replace('name = "causal_lm"', 'name = "reward"')
    .split("[evaluation]")[0]
)
SITE = """
[site]
name = "{0}"
declared_size = 20
state = "state-{0}"
[data]
path = "{1}.jsonl"
columns = {{ {2} }}
{3}
[policy]
bases = "any"
max_epsilon = 50.0
max_epsilon_per_study = 50.0
max_delta = 1e-3
{4}
"""
ACCEPTANCE = """
[acceptance]
path = "held.jsonl"
columns = { prompt = "q", completion = "a", patient = "who" }
groups = ["b"]
thresholds = { accuracy = 0.9 }
"""
ASKED = 'prompt = "q", completion = "a", patient = "who"'
LIKED = 'prompt = "q", chosen = "a", rejected = "b", patient = "who"'
PROMPTS = ("--prompts", "prompts.jsonl", "--licence", "CC0-1.0")


def lay_out(world: Path) -> None:
    """Write a tiny random base, records, two studies and their sites."""
    from tests.conftest import tiny_llama

    tiny_llama(world / "base")
    rows = [
        {"who": f"p{n}", "q": f"fever on day {n}?", "a": "yn"[n % 2], "b": "ny"[n % 2]}
        for n in range(20)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("north", "south", "open", "pairs", "evaluation", "selection"):
        (world / f"{name}.jsonl").write_text(text)
    others = text.replace('"p', '"other-').replace("fever", "cough")
    (world / "held.jsonl").write_text(others)
    (world / "prompts.jsonl").write_text(text.replace('"q"', '"prompt"'))
    (world / "keys.txt").write_text("p1\n")
    for name, plan in (("study", STUDY), ("tried", DECLARED), ("liked", PREFERENCES)):
        (world / f"{name}.toml").write_text(plan)
    scan = '[data.scan]\naction = "redact"\n'
    sites = (
        ("north", "north", ASKED, "", ""),
        ("scanned", "north", ASKED, scan, ""),
        ("south", "south", ASKED, "", ""),
        ("open", "open", ASKED, "", "allow_declared_data = true"),
        ("pairs", "pairs", LIKED, "", ""),
    )
    for name, data, columns, more, policy in sites:
        text = SITE.format(name, data, columns, more, policy)
        if name == "open":
            text = text.replace(
                'path = "open.jsonl"', 'path = "open.jsonl"\ndeclared = "generated"'
            )
        (world / f"{name}.toml").write_text(text)
    accepting = SITE.format("north", "north", ASKED, "", "") + ACCEPTANCE
    (world / "accepting.toml").write_text(accepting)


def run_all(room: Room, world: Path) -> set[str]:
    """Run one case of each command; the commands that ran."""
    ran = {"models fetch", "server", "enroll", "admit", "client", "dashboard"}

    def fedtune(*words: str, code: int = 0, says: str = "") -> str:
        first = words[0]
        ran.add(f"{first} {words[1]}" if first in ("data", "models") else first)
        return room.fedtune(*words, cwd=world, code=code, says=says)

    def two_at_a_time(cases: tuple[tuple[str, ...], ...]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda words: fedtune(*words), cases))

    two_at_a_time(BEFORE)
    room.run("server, enroll, admit, client", "sh", "-ec", BETWEEN_MACHINES, cwd=world)
    room.run("dashboard", "sh", "-ec", LOOKED_AT, cwd=world)
    two_at_a_time(OF_A_RUN)
    for words in AFTER:
        fedtune(*words)
    heard = json.loads((world / "admitted.json").read_text())["fingerprint"]
    who = ("--name", "A. Reader", "--role", "board", "--reason", "read", "--key", "reader.key")
    fedtune("verify", "run", "--trust", heard)
    fedtune("approve", "dossier", "--trust", heard, *who)
    for half in ("vault", "courier"):  # both need a site that stays up: tests/isolation
        fedtune(half, "none.toml", "--socket", "door", code=2, says="none.toml: no such file")
    extra = "pip install 'fedtune[{}]'"
    made = ("improve", "run", "--reward", "liked", *PROMPTS, "--out", "better")
    fedtune(*made, code=2, says=extra.format("rl"))
    fedtune("data", "scan", "scanned.toml", code=2, says=extra.format("scan"))
    fedtune("versions", "run", code=2, says="a run of a study with a [schedule]")
    return ran


# One shell: its processes share a network, which has loopback alone.
BETWEEN_MACHINES = """
heard() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))["fingerprint"])' $1; }
fedtune server study.toml --port 18443 --home coordinator --out run > server.log 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT
until [ -s coordinator/address ]; do kill -0 $server; sleep 0.2; done
fedtune enroll north.toml --json > enrolled.json
fedtune admit north.request --home coordinator --fingerprint "$(heard enrolled.json)" \\
    --json > admitted.json
fedtune client north.toml --once --answer north.answer \\
    --fingerprint "$(heard admitted.json)" > client.log 2>&1
wait $server
"""
LOOKED_AT = """
fedtune dashboard run > dashboard.log &
trap 'kill $!' EXIT
until grep -q token= dashboard.log; do kill -0 $!; sleep 0.2; done
python -c '
import re, urllib.request as web
address = re.search("http://[^ ]+", open("dashboard.log").read()).group()
page = web.build_opener(web.HTTPCookieProcessor()).open(address).read().decode()
assert "<html" in page and "tiny" in page, page'
"""
BEFORE: tuple[tuple[str, ...], ...] = (  # none of them needs another
    ("demo", "--quick", "--out", "demo"),
    ("init", "mine"),
    ("more",),
    ("models", "list"),
    ("models", "verify", "base"),
    ("check-plugin", "fedavg", "--group", "strategies"),
    ("plan", "study.toml", "--size", "20"),
    ("data", "report", "north.toml"),
    ("data", "describe", "north.toml"),
    ("review", "study.toml", "--site", "north.toml"),
    ("audit", "study.toml", "--out", "audited"),
    ("choose-base", "study.toml", "--base", "./base", "--target", "0.1"),
    ("tune", "tried.toml", "--sites", "open.toml", "--trials", "1", "--out", "tuned"),
    ("simulate", "study.toml", "south.toml", "--out", "other"),
    ("simulate", "liked.toml", "pairs.toml", "--out", "liked"),
)
OF_A_RUN: tuple[tuple[str, ...], ...] = (  # likewise
    ("status", "run", "--once"),
    ("doctor", "study.toml"),
    ("evaluate", "run", "--data", "evaluation.jsonl"),
    ("accept", "run", "--site", "accepting.toml"),
    ("personalise", "run", "--site", "accepting.toml"),
    ("predict", "run", "--data", "evaluation.jsonl", "--choice", "y", "--choice", "n"),
    ("generate", "run", "--prompt", "fever"),
    ("answers", "run", "--count", "2"),
    ("export", "run", "--out", "exported"),
    ("merge", "run", "other", "--out", "merged"),
    ("distill", "run", "--layers", "2", *PROMPTS, "--new-tokens", "8", "--out", "student"),
    ("label", "north.toml", "--generator", "./base", "--new-tokens", "4", "--out", "new.jsonl"),
    ("attack", "run", "--models", "8", "--canaries", "10", "--units", "20", "--out", "attacked"),
)
AFTER: tuple[tuple[str, ...], ...] = (  # one after another: they change what the next reads
    ("release", "run", "--out", "dossier", "--home", "coordinator"),
    ("backup", "study.toml", "--out", "run", "--to", "hub.backup"),
    ("restore", "hub.backup", "--to", "again"),
    ("ledger", "north.toml"),
    ("log", "north.toml"),
    ("withdraw", "north.toml", "--file", "keys.txt"),
    ("let-go", "north.toml"),
    ("evidence", "north.toml", "--to", "kept"),
    ("evidence", "kept", "--signer", "north.toml"),
    ("revoke", "north"),
    ("leave", "north.toml"),
    ("purge", "north.toml", "--yes"),
    ("memberships", "home", "--adopt", "north.toml", "--name", "north"),
)
# Where the source archive's examples/ lies beside the installed wheel: invented data, a real base.
EXAMPLES: tuple[tuple[str, ...], ...] = (
    ("python", "-m", "examples.hospitals.prepare", "--out", "hospitals"),
    ("fedtune", "plan", "hospitals/study.toml", "--sites", "hospitals/sites", "--quick"),
    ("fedtune", "simulate", "hospitals/study.toml", "--sites", "hospitals/sites", "--anyway",
     "--set", "training.rounds=1", "--out", "hospitals/run"),
    ("python", "-m", "examples.omop.prepare", "--out", "omop"),
    ("fedtune", "init", "omop/study", "--task", "classify", "--role", "coordinator",
     "--sites", "3", "--size", "40", "--patient", "person_id", "--text", "note_text",
     "--target", "note_title", "--label", "cardiology", "--label", "pulmonology",
     "--label", "orthopaedics"),
    ("fedtune", "data", "report", "omop/north.toml"),
    ("fedtune", "simulate", "omop/study/study.toml", "omop/north.toml", "omop/south.toml",
     "omop/west.toml", "--out", "omop/run"),
    ("python", "-m", "examples.rlhf.prepare", "--out", "rlhf"),
    ("fedtune", "simulate", "rlhf/reward.toml", "--out", "rlhf/run", *(
        word for name in ("harbour", "lakeside", "northgate")
        for word in ("--sites", f"rlhf/sites/{name}/reward.toml"))),
)  # fmt: skip
# In the clean environment: unpacks the site, serves it, and reads pages as a browser would.
OPENED = """
import functools, http.server, json, pathlib, sys, tarfile, threading, urllib.request as web
with tarfile.open(sys.argv[1]) as tar:
    tar.extractall("site", filter="data")
(folder,) = pathlib.Path("site").iterdir()
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass
serve = functools.partial(Quiet, directory=str(folder))
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
threading.Thread(target=server.serve_forever, daemon=True).start()
def read(name):
    return web.urlopen(f"http://127.0.0.1:{server.server_port}/{name}").read().decode()
assert "fedtune" in read("index.html") and "Experimental" in read("docs/versions.html")
assert len(json.loads(read("search.json"))["items"]) > 100
"""
