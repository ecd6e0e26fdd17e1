"""Bad inputs, made by a system: every file that a command reads, damaged in every way that files
are damaged; keys with absurd values; arguments that are no path, no name and no number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.bad_archives import archives
from tests.fuzz.bad_arguments import arguments
from tests.fuzz.bad_options import options
from tests.fuzz.bad_outputs import outputs, settings
from tests.fuzz.bad_records import records
from tests.fuzz.bad_sources import sources
from tests.fuzz.case import (
    BASE,
    DEEP,
    DISK,
    FILE,
    LONG,
    PLAN,
    PROMPTS,
    RUN,
    SERVE,
    SITE,
    Case,
    Damage,
)
from tests.fuzz.damage import (
    _as,
    _fifo,
    _folder,
    _gone,
    _half,
    _huge,
    _latin,
    _link,
    _loop,
    _nul,
    _utf16,
)

ESC = "\x1b[31m[/x]\x07"
NOISE = bytes((7 * n * n + 13 * n) % 256 for n in range(999))
ANY: dict[str, Damage] = {
    "missing": _gone,
    "folder": _folder,
    "fifo": _fifo,
    "endless": _link("/dev/zero"),
    "loop": _loop,
    "noise": _as(NOISE),
    "half": _half,
    "huge": _huge,
}
TEXT = ANY | {"utf-16": _utf16, "latin": _latin, "NUL": _nul}
JSON = TEXT | {
    "empty": _as(b""),
    "deep": _as(b"[" * DEEP),
    "deep object": _as(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "list": _as(b"[]"),
    "null": _as(b"null"),
    "number": _as(b"5"),
    "digits": _as(b'{"a": ' + b"1" * 5000 + b"}"),
    "object": _as(b"{}"),
    "surrogate": _as(b'{"\\ud800": "\\udfff"}'),
}
TOML = TEXT | {
    "deep": _as(b"a = " + b"[" * DEEP),
    "deep key": _as(b".".join([b"a"] * DEEP) + b" = 1"),
    "digits": _as(b"a = " + b"1" * 5000),
    "empty": _as(b""),
    "twice": _as(b"[site]\n[site]\n[study]\n[study]\n"),
}
WRONG: dict[str, Any] = {
    "null": None,
    "list": [],
    "object": {},
    "number": 5,
    "negative": -1.5,
    "text": "x",
    "deep": [[[{"a": [None]}]]],
    "ESC": ESC,
}


def _key(key: str, value: Any) -> Damage:
    """Another value for a key of a JSON object; "a.b" is a key of an inner one."""

    def damage(path: Path) -> None:
        body = json.loads(path.read_bytes())
        *outer, last = key.split(".")
        table = body
        for name in outer:
            table = table[name]
        table[int(last) if isinstance(table, list) else last] = value
        path.write_text(json.dumps(body))

    return damage


def _edit(old: str, new: str) -> Damage:
    def damage(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert old in text, old
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return damage


def _at(file: str, damage: Damage) -> Damage:
    return lambda world: damage(world / file)


ADMIT = ("admit", "north.request", "--address", "hub.example:8443", "--fingerprint", "00")
WHO = ("--name", "A", "--role", "board", "--reason", "read")
APPROVE = ("approve", "dossier", "--trust", "00", *WHO, "--key", "new.key")
READ_BY: dict[str, tuple[dict[str, Damage], tuple[tuple[str, ...], ...]]] = {
    PLAN: (
        TOML,
        (
            ("plan", PLAN, "--size", "20"),
            ("simulate", PLAN, "--out", "new"),
            SERVE,
            ("doctor", PLAN),
            ("review", PLAN, "--site", SITE),
            ("choose-base", PLAN, "--target", "1"),
            ("audit", PLAN, "--out", "new"),
            ("tune", PLAN, "--out", "new"),
            ("backup", PLAN, "--to", "new.backup"),
        ),
    ),
    "hub.backup": (
        ANY | {"empty": _as(b"")},
        (("restore", "hub.backup", "--to", "new"),),
    ),
    SITE: (
        TOML,
        (
            ("plan", PLAN, "--sites", SITE),
            ("simulate", PLAN, SITE, "--out", "new"),
            ("client", SITE),
            ("enroll", SITE, "--out", "new"),
            ("doctor", SITE),
            ("review", PLAN, "--site", SITE),
            ("ledger", SITE),
            ("purge", SITE),
            ("leave", SITE),
            ("evidence", SITE, "--to", "new"),
            ("data", "report", SITE),
            ("data", "scan", SITE),
            ("withdraw", SITE, "--file", "keys.txt"),
            ("label", SITE, *BASE, "--out", "new.jsonl"),
            ("status", SITE),
            ("dashboard", SITE),
        ),
    ),
    "plan.json": (JSON, (("review", "plan.json", "--site", SITE),)),
    "keys.txt": (
        {name: TEXT[name] for name in TEXT if name != "half"} | {"empty": _as(b"\n\n")},
        (("withdraw", SITE, "--file", "keys.txt"),),
    ),
    "rubric.txt": (
        {name: TEXT[name] for name in TEXT if name not in ("half", "NUL")},
        (("label", "north.jsonl", "--column", "prompt=q", "--rubric", "rubric.txt", *BASE,
          "--out", "new.jsonl"),),
    ),
    "north.request": (JSON, (ADMIT,)),
    "coordinator/ca.pem": (
        {name: ANY[name] for name in ANY if name != "missing"} | {"empty": _as(b"")},
        (("admit-rightly",),),
    ),
    "coordinator/server.pem": (
        {name: ANY[name] for name in ANY if name != "missing"} | {"empty": _as(b"")},
        (SERVE, ("doctor", PLAN)),
    ),
    "coordinator/signing.key": (
        {name: ANY[name] for name in ANY if name != "missing"} | {"empty": _as(b"")}, (SERVE,)
    ),
    "coordinator/address": (
        {name: ANY[name] for name in ("folder", "fifo", "endless", "loop", "noise", "huge")}
        | {"empty": _as(b""), "port": _as("hub:²".encode())},
        (("admit-rightly",), ("doctor", PLAN)),
    ),
    "coordinator/nodes/south.json": (
        {name: JSON[name] for name in JSON if name != "missing"},
        (("admit-rightly",), ("doctor", PLAN)),
    ),
    "run/plan.json": (
        JSON,
        (
            ("evaluate", RUN, "--data", "evaluation.jsonl"),
            ("predict", RUN, "--data", "evaluation.jsonl", "--choice", "y", "--choice", "n"),
            ("generate", RUN, "--prompt", "a"),
            ("answers", RUN),
            ("export", RUN, "--out", "new"),
            ("merge", RUN, "other", "--out", "new"),
            ("distill", RUN, "--layers", "2", *PROMPTS),
        ),
    ),
    "run/report.json": (
        JSON,
        (
            ("export", RUN, "--out", "new"),
            ("merge", RUN, "other", "--no-measure", "--out", "new"),
            ("audit", PLAN, "--run", RUN, "--out", "new"),
            ("attack", RUN, "--out", "new"),
            ("verify", RUN),
        ),
    ),
    "run/signature.json": (JSON, (("verify", RUN),)),
    "run/evidence.json": (JSON, (("verify", RUN), ("export", RUN, "--out", "new"))),
    "run/metrics.jsonl": (ANY, (("verify", RUN), ("release", RUN, "--out", "new"))),
    "site-north-sheet.toml": (
        {name: TOML[name] for name in TOML if name not in ("missing", "half", "empty", "endless")},
        (("data", "describe", SITE),),
    ),
    "details.toml": (
        {name: TOML[name] for name in TOML if name not in ("missing", "half", "empty")},
        (("release", RUN, "--out", "new", "--details", "details.toml"),),
    ),
    "dossier/release.json": (JSON, (("verify", "dossier"), APPROVE)),
    "dossier/dossier.json": (ANY, (("verify", "dossier"),)),
    "run/adapter/adapter_model.safetensors": (
        ANY,
        (
            ("evaluate", RUN, "--data", "evaluation.jsonl"),
            ("predict", RUN, "--data", "evaluation.jsonl", "--choice", "y", "--choice", "n"),
            ("generate", RUN, "--prompt", "a"),
            ("answers", RUN),
            ("export", RUN, "--out", "new"),
            ("merge", RUN, "other", "--out", "new"),
            ("models", "verify", RUN),
        ),
    ),
    "run/adapter/adapter_config.json": (JSON, (("generate", RUN, "--prompt", "a"),)),
    "base/config.json": (JSON, (("models", "verify", "base"),)),
    "base/tokenizer.json": (JSON, (("models", "verify", "base"),)),
    "base/tokenizer_config.json": (
        {n: d for n, d in JSON.items() if n not in ("missing", "object", "surrogate", "digits")},
        (("models", "verify", "base"),),
    ),
    "base/model.safetensors": (ANY, (("models", "fetch", "./base"),)),
    "base/chat_template.jinja": (
        {n: d for n, d in TEXT.items() if n not in ("missing", "half", "NUL")},
        (("models", "verify", "base"),),
    ),
    "run/status.json": (JSON, (("status", RUN, "--once"), ("status", RUN, "--check"))),
    "versions/versions/index.json": (
        JSON, (("versions", "versions"), ("versions", "versions", "--unpin"))
    ),
    "evaluation.jsonl": (
        {name: ANY[name] for name in ("missing", "folder", "fifo", "endless", "loop", "noise")}
        | {"empty": _as(b""), "deep": _as(b"[" * DEEP), "numbers": _as(b"1\n2\n")},
        (("evaluate", RUN, "--data", "evaluation.jsonl"),),
    ),
    "prompts.jsonl": (
        {name: ANY[name] for name in ("missing", "folder", "fifo", "endless", "loop", "noise")}
        | {"empty": _as(b""), "deep": _as(b"[" * DEEP)},
        (("distill", RUN, "--layers", "2", *PROMPTS),),
    ),
    "north.jsonl": (
        {name: ANY[name] for name in ("missing", "folder", "fifo", "endless", "loop")},
        (("simulate", PLAN, "--out", "new"), ("label", SITE, *BASE, "--out", "new.jsonl")),
    ),
    "state-north/ledger.db": (
        {name: ANY[name] for name in ("missing", "folder", "fifo", "noise")},
        (("ledger", SITE), ("review", PLAN, "--site", SITE)),
    ),
    "state-north/ledger.head": (
        {name: JSON[name] for name in JSON if name not in ("surrogate", "utf-16")},
        (("ledger", SITE),),
    ),
    "state-north/site.key": (ANY | {"empty": _as(b"")}, (("ledger", SITE),)),
    "state-north/audit.jsonl": (JSON, (("log", SITE),)),
    "state-north/salt": (ANY | {"empty": _as(b"")}, (("ledger", SITE),)),
}  # fmt: skip
MAY_PASS = frozenset({0, 2})  # shown as far as it can be read
READABLE = {
    ("coordinator/address", "doctor"),  # what sites call the machine is then not checked
    ("hub.backup", "huge"),  # whole, and zeros behind it: an archive says itself where it ends
    *(("run/adapter/adapter_config.json", kind) for kind in ("object", "surrogate", "digits")),
}


def files() -> Iterator[Case]:
    """Every damage of every file, for every command that reads it."""
    for file, (damages, commands) in READ_BY.items():
        for kind, damage in damages.items():
            for command in commands:
                own = file.startswith("state-") or file.endswith("signing.key")
                codes = DISK if own or command[-1] == "--check" else FILE
                if (file, kind) in READABLE or (file, command[0]) in READABLE:
                    codes = MAY_PASS
                said = (
                    command[0]
                    if command[0] not in ("status", "versions", "data")
                    else " ".join(command)
                )
                yield Case(f"{file}: {kind}: {said}", _at(file, damage), command, codes)


def keys() -> Iterator[Case]:
    """Another type for each key of a JSON file."""
    wrong: tuple[tuple[str, tuple[str, ...], tuple[str, ...], frozenset[int]], ...] = (
        ("run/status.json", ("role", "state", "sites", "last", "rounds", "quality",
            "seconds", "next", "study", "updated", "sites.north",
            "sites.north.epsilon", "sites.north.bytes_up",
            "last.0", "champion"), ("status", RUN, "--once"), MAY_PASS),
        ("run/report.json", ("privacy", "base", "study", "private", "privacy.delta",
            "privacy.sites", "base.digest"),
            ("merge", RUN, "other", "--no-measure", "--out", "new"), MAY_PASS),
        ("run/report.json", ("privacy", "base", "study", "adapter"),
            ("export", RUN, "--out", "new"), MAY_PASS),
        ("north.request", ("name", "node", "csr", "signing", "signature", "node_signature"), ADMIT,
            FILE),
        ("coordinator/nodes/south.json", ("name", "node", "tls", "format"), ("admit-rightly",),
            frozenset({0, 2, 3})),
        ("base/config.json", ("architectures", "model_type", "hidden_size", "num_hidden_layers",
            "vocab_size", "max_position_embeddings", "num_attention_heads", "rms_norm_eps",
            "rope_parameters"),
            ("label", "north.jsonl", "--column", "prompt=q", "--generator", "./base",
             "--new-tokens", "1", "--out", "new.jsonl"), MAY_PASS),
        ("base/tokenizer.json", ("model", "added_tokens", "decoder", "pre_tokenizer"),
            ("label", "north.jsonl", "--column", "prompt=q", "--generator", "./base",
             "--new-tokens", "1", "--out", "new.jsonl"), MAY_PASS),
        ("versions/versions/index.json", ("champion", "pinned", "versions", "versions.0"),
            ("versions", "versions"), MAY_PASS),
        ("run/adapter/adapter_config.json", ("r", "target_modules", "peft_type", "lora_alpha",
            "layers_to_transform"), ("generate", RUN, "--prompt", "a"), MAY_PASS),
    )  # fmt: skip
    for file, names, command, codes in wrong:
        for name in names:
            for kind, value in WRONG.items():
                said = " ".join(command[:1])
                yield Case(
                    f"{file} {name}: {kind}: {said}", _at(file, _key(name, value)), command, codes
                )


BOUNDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("rounds = 2", "rounds", ("0", "-1", "1.5", "1e6", "10000000000", '"2"', "true", "[]")),
    ("rank = 2", "rank", ("0", "-1", "99999999999999999999", "1000000", "nan")),
    ("alpha = 4", "alpha", ("0", "-1", "1e-300", "1e300", "inf", "nan")),
    ("last_layers = 2", "last_layers", ("0", "10000000000")),
    ("max_length = 64", "max_length", ("0", "7", "10000000000")),
    ("sampling_rate = 1.0", "sampling_rate", ("0", "-0.1", "1.1", "nan", "1e-300")),
    ("sampling_rate = 1.0", "expected_batch", ("0", "99999999999999999999")),
    ("learning_rate = 0.5", "learning_rate", ("0", "1e300", "1e-300", "inf", "nan", '"x"')),
    ("max_grad_norm = 0.5", "max_grad_norm", ("0", "1e-300", "1e300", "inf", "nan")),
    ("epsilon = 5.0", "epsilon", ("0", "1e-300", "1e300", "inf", "nan", "-5")),
    ("epsilon = 5.0", "noise_multiplier", ("0", "1e-300", "1e300", "inf", "nan")),
    ("delta = 1e-3", "delta", ("0", "1", "1e-300", "nan", "-1e-3")),
    ("seed = 1", "seed", ("-1", "99999999999999999999", "0.5")),
    ("min_sites = 1", "min_sites", ("0", "99999999999999999999")),
    ("round_timeout = 120", "round_timeout", ("0", "1e300", "inf", "nan")),
    ('name = "fedavg"', "name", ('"os"', '""', '"../x"', '"_base"', "5", '"fedavg\\u0000"')),
    ('name = "causal_lm"', "name", ('"os"', '""', '"_tokens"', "5")),
    ('name = "tiny"', "name", ('""', '"a b"', '"../x"', f'"{LONG}"', '"a\\u0000"', '"é"', "5")),
    ('dtype = "float32"', "dtype", ('"float8"', "5")),
    ("local_steps = 1", "local_steps", ("0", "99999999999999999999")),
    ('metric = "loss"', "metric", ('"os"', "5", "[]")),
    ('path = "evaluation.jsonl"', "path", ('"a\\u0000"', f'"{LONG}"', '""', "5")),
)
SITE_BOUNDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("declared_size = 20", "declared_size", ("0", "-1", "99999999999999999999", "1.5")),
    ('state = "state-north"', "state", ('"a\\u0000b"', f'"{LONG}"', '"north.jsonl"', "5",
        '"' + "d/" * 3000 + '"')),
    ('path = "north.jsonl"', "path", ('"a\\u0000b"', f'"{LONG}"', "5")),
    ('name = "north"', "name", ('""', '"a b"', '"../x"', f'"{LONG}"', '"a\\u0000"')),
    ("max_epsilon = 8.0", "max_epsilon", ("0", "nan", "inf", "-1")),
    ("max_delta = 1e-3", "max_delta", ("0", "1", "nan", "0.9")),
    ("max_rank = 64", "max_rank", ("0", "99999999999999999999")),
    ('bases = "any"', "bases", ('"some"', '["sha256:x"]', "5")),
)  # fmt: skip


def bounds() -> Iterator[Case]:
    """Absurd values, one key at a time: said when the file is read, with the key's name."""
    for old, key, values in BOUNDS:
        for value in values:
            shown = value if len(value) < 40 else "LONG"
            damage = _at(PLAN, _edit(old, f"{key} = {value}"))
            yield Case(f"study {old} → {key} = {shown}", damage, ("plan", PLAN, "--size", "20"))
    for old, key, values in SITE_BOUNDS:
        for value in values:
            shown = value if len(value) < 40 else f"LONG {value[-3]}"
            damage = _at(SITE, _edit(old, f"{key} = {value}"))
            for command in (("ledger", SITE), ("plan", PLAN, "--sites", SITE)):
                codes = DISK if value == '"north.jsonl"' else FILE
                if value == '"north.jsonl"' and command[0] == "plan":
                    continue
                yield Case(f"site {key} = {shown}: {command[0]}", damage, command, codes)


def cases() -> list[Case]:
    found = [*files(), *keys(), *bounds(), *sources(), *arguments()]
    return [*found, *options(), *outputs(), *settings(), *archives(), *records()]
