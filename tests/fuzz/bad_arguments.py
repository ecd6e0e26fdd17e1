"""Arguments that no command can use."""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.case import (
    BASE,
    DISK,
    LONG,
    PLAN,
    PROMPTS,
    REFUSED,
    RUN,
    SERVE,
    SITE,
    Case,
    nothing,
)


def arguments() -> Iterator[Case]:
    """Paths, names and numbers that no file system, network or computation has."""
    yield from _paths_and_names()
    yield from _derivations()
    yield from _runs()


CHOICES = ("--choice", " yes", "--choice", " no")


def _paths_and_names() -> Iterator[Case]:
    long = (
        ("init", LONG), ("init", "a/" * 3000), ("models", "fetch", LONG),
        ("models", "verify", LONG),
        ("models", "verify", ""), ("models", "fetch", "a/b/c"), ("models", "verify", "pypi:"),
        ("models", "verify", "pypi:../x"), ("plan", LONG), ("doctor", LONG), ("ledger", LONG),
        ("simulate", PLAN, "--out", LONG), ("export", RUN, "--out", LONG),
        ("export", LONG, "--out", "new"), ("generate", LONG, "--prompt", "a"),
        ("merge", RUN, LONG, "--out", "new"), ("merge", RUN, "other", "--out", LONG),
        ("evaluate", RUN, "--data", LONG), ("status", LONG), ("versions", LONG),
        ("predict", RUN, "--data", LONG, *CHOICES), ("predict", LONG, "--data", "prompts.jsonl"),
        ("predict", RUN, "--data", "prompts.jsonl", *CHOICES, "--out", f"{LONG}.csv"),
        ("revoke", LONG), ("revoke", ""), ("revoke", "../x"), ("revoke", "a\nb"),
        ("withdraw", SITE, "--file", LONG), ("review", LONG, "--site", SITE),
        ("audit", PLAN, "--run", LONG, "--out", "new"), ("enroll", SITE, "--out", LONG),
        ("ledger", SITE, "--backup", LONG), ("ledger", SITE, "--restore", "--from", LONG),
        ("label", LONG, "--column", "prompt=q", *BASE), (*SERVE, "--home", LONG),
        ("label", "north.jsonl", "--column", "prompt=q", "--rubric", LONG, *BASE),
        ("data", "describe", LONG), ("data", "describe", SITE, "--public", LONG),
        ("release", LONG, "--out", "new"), ("release", RUN, "--out", LONG),
        ("release", RUN, "--out", "new", "--details", LONG), ("release", RUN, "--out", RUN),
        ("approve", LONG, "--trust", "0", "--name", "a", "--role", "b", "--reason", "c",
         "--key", "new.key"),
        ("check-plugin", LONG), ("check-plugin", "../x"),
        ("check-plugin", "causal_lm", "--option", "x"),
        ("check-plugin", "fedavg", "--group", "strategies", "--file", LONG),
        ("admit", LONG), ("choose-base", PLAN, "--target", "1", "--json", LONG),
    )  # fmt: skip
    for command in long:
        name = " ".join(command).replace(LONG, "LONG").replace("a/" * 3000, "DEEP")
        yield Case(f"argument: {name}", nothing, command, REFUSED)
    for address in ("x", "x:", ":1", "x:0", "x:99999", "x:²", "x:1 2", "a b:1", "x:-1", "[::1",
                    "é:1", "x\n:1", LONG + ":1", "x/y:1", "u@x:1", "\x1b[31m:1"):  # fmt: skip
        command = ("admit-rightly", "--address", address)
        yield Case(f"address: {address[:12]!r}", nothing, command)
    for name in (
        "a b",
        "",
        "é",
        "a\nb",
        LONG,
        "*",
        "a:b",
        "a/b",
        "-a",
        "\x1b[31m",
        "x" * 64 + ".org",
    ):
        yield Case(f"--name {name[:12]!r}", nothing, (*SERVE, "--name", name))


def _derivations() -> Iterator[Case]:
    for weights in ("x", "1", "1,2,3", "nan,1", "inf,1", ",", "1;2", "1e400,1"):
        yield Case(f"--weights {weights}", nothing, ("merge", RUN, "other", "--weights", weights,
                                                    "--no-measure", "--out", "new"))  # fmt: skip
    for density in ("nan", "0", "-1", "2", "inf"):
        yield Case(f"--density {density}", nothing, ("merge", RUN, "other", "--method", "ties",
                   "--density", density, "--no-measure", "--out", "new"))  # fmt: skip
    for pair in ("x", "prompt", "=", "prompt=", "patient=", "os=q", "prompt=nothing-there",
                 "prompt=q\0"):  # fmt: skip
        yield Case(f"--column {pair!r}", nothing,
                   ("evaluate", RUN, "--data", "evaluation.jsonl", "--column", pair))  # fmt: skip
    distilled = ("distill", RUN, *PROMPTS)
    for extra in (("--layers", "99"), ("--layers", "2", "--student", "./base"), (),
                  ("--layers", "2", "--temperature", "0"),
                  ("--layers", "2", "--temperature", "nan"),
                  ("--layers", "2", "--learning-rate", "nan"), ("--layers", "2", "--licence", " "),
                  ("--layers", "2", "--seed", "-1"), ("--layers", "2", "--rank", "1000000"),
                  ("--layers", "2", "--new-tokens", "10000000"), ("--student", "nowhere/no"),
                  ("--student", LONG)):  # fmt: skip
        yield Case(f"distill {' '.join(extra)[:60]}", nothing, (*distilled, *extra))
    improved = ("improve", RUN, "--reward", "other", *PROMPTS)
    for extra in ((), ("--max-kl", "nan"), ("--max-kl", "0"), ("--max-kl", "-1"),
                  ("--kl-coef", "nan"), ("--learning-rate", "nan"), ("--seed", "-1")):  # fmt: skip
        yield Case(f"improve {' '.join(extra)}", nothing, (*improved, *extra))
    labelled = ("label", "north.jsonl", "--column", "prompt=q", "--generator", "./base")
    for extra in (("--temperature", "nan"), ("--temperature", "inf"), ("--judge", "nowhere"),
                  ("--judge-digest", "x"), ("--generator-digest", "x"), ("--out", "new.txt"),
                  ("--judge", LONG), ("--new-tokens", "10000000")):  # fmt: skip
        out = () if "--out" in extra else ("--out", "new.jsonl")
        yield Case(f"label {' '.join(extra)[:40]}", nothing, (*labelled, *out, *extra))
    yield Case("choose-base: --base", nothing, ("choose-base", PLAN, "--target", "nan"))
    yield Case(
        "choose-base: --epsilon",
        nothing,
        ("choose-base", PLAN, "--target", "1", "--epsilon", "nan"),
    )
    yield Case(
        "choose-base: --epsilon 0",
        nothing,
        ("choose-base", PLAN, "--target", "1", "--epsilon", "-1"),
    )
    yield Case(
        "choose-base: --quantised",
        nothing,
        ("choose-base", PLAN, "--target", "1", "--quantised", "int3"),
    )


def _runs() -> Iterator[Case]:
    yield Case("generate: too long", nothing, ("generate", RUN, "--prompt", "word " * 20_000))
    yield Case("generate: more than fits", nothing,
               ("generate", RUN, "--prompt", "a", "--max-new-tokens", "100000"))  # fmt: skip
    yield Case("generate: no prompt", nothing, ("generate", RUN))
    yield Case("generate: --file", nothing, ("generate", RUN, "--prompt", "a", "--file", "x.png"))
    yield Case("generate: surrogate", nothing, ("generate", RUN, "--prompt", "\udc80"))
    yield Case("predict: no choices", nothing, ("predict", RUN, "--data", "evaluation.jsonl"))
    yield Case("predict: over the records", nothing, ("predict", RUN, "--data", "evaluation.jsonl",
               *CHOICES, "--out", "evaluation.jsonl"))  # fmt: skip
    yield Case("predict: no lines for a prompt", nothing,
               ("predict", RUN, "--data", "keys.txt", *CHOICES))  # fmt: skip
    for metric in ("accuracy", "f1", "preference"):
        yield Case(f"evaluate: {metric}", nothing,
                   ("evaluate", RUN, "--data", "evaluation.jsonl", "--metric", metric))  # fmt: skip
    yield Case("simulate: --rounds", nothing, ("simulate", PLAN, "--rounds", "2", "--out", "new"))
    yield Case("simulate: two of a name", nothing,
               ("simulate", PLAN, SITE, SITE, "--out", "new"))  # fmt: skip
    yield Case("versions: both", nothing, ("versions", "versions", "--unpin", "--rollback", "1"))
    yield Case("versions: none such", nothing, ("versions", "versions", "--rollback", "99"))
    yield Case("merge: one", nothing, ("merge", RUN, "--out", "new"))
    yield Case("merge: the same", nothing, ("merge", RUN, RUN, "--out", "new"))
    yield Case("export: there", nothing, ("export", RUN, "--out", "other"))
    yield Case("export: q8_0 in hf", nothing, ("export", RUN, "--out", "new", "--dtype", "q8_0"))
    yield Case("doctor: --home at a site", nothing, ("doctor", SITE, "--home", "coordinator"))
    below = "below a file"  # the disk's refusal
    yield Case(f"enroll: {below}", nothing, ("enroll", SITE, "--out", "keys.txt/a"), DISK)
    yield Case(f"init: {below}", nothing, ("init", "keys.txt/a"), DISK)
    yield Case("init: there", nothing, ("init", "."))
    yield Case("client: not enrolled", nothing, ("client", SITE))
    yield Case("withdraw: nobody", nothing, ("withdraw", SITE))
