"""One way to read a file that a person named, an address, and a name for a derived run."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedtune.core.config import load_site, load_study
from fedtune.core.config.address import host_and_port, is_host
from fedtune.core.errors import ConfigError, InputError, ModelError
from fedtune.core.files import reading
from fedtune.derive.derived_run import derived_study
from fedtune.flower import certs
from fedtune.flower.ports import address_of
from tests.expected import raises_only
from tests.limits import cpu_limit
from tests.server.fakes import make_study

ROOT = Path(__file__).parents[1]


def test_a_regular_file_is_read_whole_up_to_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": [1, "\xc3\xa9"]}')
    assert reading.content(path, "x", most=len(path.read_bytes())) == path.read_bytes()
    assert reading.json_in(path, "x") == {"a": [1, "é"]}
    with pytest.raises(InputError, match="larger than"):
        reading.content(path, "x", most=3)
    of_no_length = reading.content(Path("/proc/self/cmdline"), "x")  # which the system says is 0
    assert of_no_length and of_no_length == Path("/proc/self/cmdline").read_bytes()
    with pytest.raises(InputError, match="larger than"):
        reading.content(Path("/proc/self/cmdline"), "x", most=3)
    linked = tmp_path / "linked"
    linked.symlink_to(path)
    assert reading.text(linked, "x") == '{"a": [1, "é"]}'


def test_whatever_waits_or_never_ends_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in {
        tmp_path / "pipe": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path: "a folder",
        tmp_path / "loop": "symbolic links",
        tmp_path / "none": "no such file",
        tmp_path / ("n" * 300): "longer than a path can be",
        tmp_path / "a\0b": "holds a NUL",
        tmp_path / "pipe" / "x": "cannot be read",
    }.items():
        with pytest.raises(ModelError, match=words) as said:
            reading.content(path, "a file", "look again", ModelError)
        assert (said.value.expected, said.value.todo) == ("a file", "look again")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 101 + b"1" + b"}" * 101,
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[]",
        b"\xff",
        b"",
    ],
)
def test_json_that_no_file_of_ours_holds_is_refused(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(body)
    with pytest.raises(InputError):
        reading.json_in(path, "x")


def test_depth_is_counted_exactly() -> None:
    inside: object = 1
    for _ in range(reading.DEPTH - 1):
        inside = [inside]
    assert reading.is_sound(inside) and not reading.is_sound([inside])


@pytest.mark.parametrize("part", ["a", '"a"', "'a . b'", "a-b "])
def test_a_key_of_very_many_parts_costs_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """It is not parsed. Twin: a key of fewer is one; and dots in a text are no parts."""
    path = tmp_path / "a.toml"
    for parts in (reading.DEPTH + 1, 100_000):
        path.write_text(".".join([part] * parts) + " = 1")
        with monkeypatch.context() as patch, raises_only(InputError, "nested too deep"):
            patch.setattr(reading.tomllib, "loads", lambda *_: pytest.fail("parsed"))
            reading.toml_in(path, "x")
    path.write_text('t = "' + "One. Two words. " * 500 + '"\na.b."c.d".e = 1')
    assert reading.toml_in(path, "x")["a"]["b"]["c.d"]["e"] == 1
    key = ".".join([part] * (reading.DEPTH - 1))
    path.write_text(f'x = "{"." * 500}"\n{key} = 1')
    assert "x" in reading.toml_in(path, "x")


@pytest.mark.parametrize("line", ['a = "{}"', "# {}", '"{}" = 1', "a = '{} . {}'"])
@pytest.mark.parametrize("word", ["a" * 400_000, "-" * 400_000, "a." * 99 + " ", "'\"" * 100_000])
def test_a_long_word_in_a_table_costs_no_time(tmp_path: Path, line: str, word: str) -> None:
    """A plan comes from somebody else."""
    path = tmp_path / "a.toml"
    path.write_text(line.format(word, word))
    with cpu_limit(20), suppress(InputError):
        reading.toml_in(path, "x")


SEARCHES = ("search", "sub", "split", "findall", "finditer")


def patterns() -> Iterator[tuple[str, re.Pattern[str], bool]]:
    """Every regular expression of ours on text, and whether it is looked for at any place."""
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
        searched = set(re.findall(rf"([A-Z_]+)\.(?:{'|'.join(SEARCHES)})\(", source))
        tree = ast.parse(source)
        names = {
            id(node.value): ast.unparse(node.targets[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                first, called = (node.args or [None])[0], ast.unparse(node.func)[3:]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    anywhere = called in SEARCHES or names.get(id(node)) in searched
                    yield f"{name}:{node.lineno}", re.compile(first.value), anywhere
    yield "reading", reading._KEY, True


def test_no_pattern_takes_a_time_that_explodes() -> None:
    """Twin: one that reads a word again from each of its letters, and one that may cut it anywhere,
    are seen."""
    every = list(patterns())
    assert len(every) > 40
    assert sum(anywhere for _, _, anywhere in every) > 10
    for name, pattern, anywhere in every:
        assert is_linear(pattern, anywhere), name
    assert not is_linear(re.compile(r"(?:\w+\.){3}"))
    assert not is_linear(re.compile(r"[0-9A-F]{1,4}([ :-]?[0-9A-F]{1,4}){0,31}"))


UNITS = ("a", "A", "0", "-", ".", " ", "\n", "a.", "a ", "0,", '"', "'", "[", "{% ", "_", "/", "%")


def is_linear(pattern: re.Pattern[str], anywhere: bool = True) -> bool:
    """Return whether a pattern is soon done with long runs of one thing, whatever ends them."""
    try:
        with cpu_limit(3):
            for unit in UNITS:
                for end in ("", "!", "\n"):
                    pattern.fullmatch(unit * 40 + end)
                    pattern.match(unit * 40_000 + end)
                    if anywhere:
                        pattern.search(unit * 40_000 + end)
    except AssertionError:
        return False
    return True


def test_an_address_is_a_host_and_a_port() -> None:
    good = {"hub.example:8443": ("hub.example", 8443), "[::1]:1": ("::1", 1)}
    good |= {"10.0.0.1:65535": ("10.0.0.1", 65535), "fed_server:80": ("fed_server", 80)}
    assert {text: host_and_port(text) for text in good} == good
    assert [address_of(*host_and_port(text)) for text in good] == list(good)
    for bad in ("x", "x:", ":1", "x:0", "x:65536", "x:²", "x:1 ", "a b:1", "::1:1", "é:1", "u@x:1"):
        with pytest.raises(ValueError, match="host:port"):
            host_and_port(bad)
    assert is_host("::1") and not any(map(is_host, ("", "*", "a b", "a/b", "x" * 64, "-a", "a\n")))


@pytest.mark.parametrize(
    ("folder", "name"),
    [("my student", "my-student"), ("é", "x"), ("..", "x"), ("n" * 99, "n" * 64), ("a_b", "a_b")],
)
def test_a_derived_run_has_a_name_that_opens_again(folder: str, name: str) -> None:
    study = make_study()
    seeded = study.model_copy(update={"study": study.study.model_copy(update={"seed": 7})})
    made = derived_study(seeded, Path("runs") / folder, "x")
    assert (made.study.name, made.study.seed) == (name, 7)
    assert type(made).model_validate_json(made.model_dump_json()) == made


def test_an_unknown_strategy_or_objective_is_said_when_the_plan_is_read(tmp_path: Path) -> None:
    from fedtune.presets.templates import STUDY

    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    assert load_study(path).strategy.name == "fedavg"
    for old, new, key in (
        ('"fedavg"', '"os"', "strategy.name"),
        ('"causal_lm"', '"os"', "objective.name"),
        ('"fedavg"', '"fedavg"\noptions = { os = 1.0 }', "os"),
    ):
        path.write_text(STUDY.replace(old, new, 1))
        with pytest.raises(ConfigError, match=key) as said:
            load_study(path)
        assert "study.toml" in str(said.value)


def test_a_path_or_an_address_that_cannot_be_is_said_when_the_site_is_read(tmp_path: Path) -> None:
    from fedtune.presets.templates import SITE

    path = tmp_path / "site.toml"
    for key, old, value in (
        ("site.state", 'state = "state"', 'state = "a\\u0000b"'),
        ("site.state", 'state = "state"', f'state = "{"n" * 300}"'),
        ("data.path", 'path = "data.jsonl"', 'path = ""'),
        ("site.declared_size", "declared_size = 200", f"declared_size = {10**10}"),
    ):
        path.write_text(SITE.replace(old, value, 1))
        with pytest.raises(ConfigError, match=key):
            load_site(path)
    path.write_text(SITE + '\n[coordinator]\nanswer = "a"\naddress = "x:²"\n')
    with pytest.raises(ConfigError, match=r"coordinator\.address: must be host:port"):
        load_site(path)


def test_the_coordinators_names_are_names(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    for name in ("a b", "", "a/b", "é", "*"):
        with pytest.raises(ConfigError, match="not a host name"):
            certs.server_leaf(home, [name])
    assert not home.exists()
    certs.server_leaf(home, ["hub.example", "10.0.0.1"]).write_text("-----BEGIN nothing")
    with pytest.raises(ConfigError, match=r"server\.pem"):
        certs.server_leaf(home)
