"""Load study.toml and site.toml."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ValidationError,
)

from fedtune.core.config.hospital import FILE, Hospital, share_in
from fedtune.core.config.overrides import overridden
from fedtune.core.config.site import Site
from fedtune.core.config.study import Study
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading

MOST_KEY = 80  # characters of a key that a message shows
T = TypeVar("T", Study, Site, Hospital)
EXPECTED: dict[type, tuple[str, str, str]] = {  # the file, what writes it, what explains its keys
    Study: ("a study.toml", "`fedtune init DIR`", "the comments of `fedtune init`"),
    Site: ("a site.toml", "`fedtune init DIR`", "the comments of `fedtune init`"),
    Hospital: ("a hospital.toml", "`fedtune memberships`", "`fedtune memberships --help`"),
}
WORDS = {  # a pattern, as a person would say it
    r"^sha256:[0-9a-f]{64}$": 'must be "sha256:" and 64 hexadecimal digits',
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "must be 1 to 64 letters, digits, dots, dashes or "
    "underscores, and start with a letter or digit",
}


def load_study(
    path: Path | str,
    permit: Callable[[Study], None] = lambda study: None,
    settings: Iterable[str] = (),
) -> Study:
    """Read a study from study.toml; relative paths in it are relative to the file.

    settings: values that replace those of the file, each "KEY=VALUE" as for `--set`. permit: a
    function that is called with the study before its plug-ins are imported, and raises if they may
    not be imported. By default they may, which fits a study that the caller wrote.

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> fedtune.load_study(study_file).study.name
    'my-study'
    >>> fedtune.load_study(study_file, settings=["training.rounds=4"]).training.rounds
    4

    Errors: ConfigError naming the file and the key; what `permit` raises."""
    study = _load(Study, Path(path), settings)
    permit(study)
    _check_modules(study, str(path))
    return study


def load_site(
    path: Path | str,
    *,
    alone: bool = False,
    at: Path | None = None,
    keys_may_differ: bool = False,
) -> Site:
    """Read a site from site.toml; relative paths in it are relative to the file. A membership of a
    hospital is under the ceilings of hospital.toml in its home.

    - path: the site file, usually site.toml
    - alone: read the site file only, for example if the hospital's home cannot be reached
    - at: the path that the site file will have, if `path` is a draft
    - keys_may_differ: accept that another membership of the hospital reads patients' keys in
      another way, for an officer's commands, which train nothing

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> fedtune.load_site(site_file).policy.max_epsilon
    8.0

    Errors: ConfigError naming the file and the key."""
    path = Path(path)
    site = _load(Site, path)
    if site.hospital and not alone:
        site = share_in(site, load_hospital(site.hospital.home), at or path, keys_may_differ)
    site._file = path.resolve()
    return site


def load_hospital(home: Path, name: str = FILE) -> Hospital:
    """Read hospital.toml in a hospital's home, or a draft of it called `name`. Errors: ConfigError
    naming the file and the key."""
    return _load(Hospital, home / name)


def validate_study(study: Study) -> Study:
    """Validate a study as if it were read from a file, and return the validated one. This is for
    copies, since `model_copy` validates nothing.

    Errors: ConfigError naming the key."""
    try:
        valid = Study.model_validate_json(study.model_dump_json())
    except ValidationError as error:
        raise ConfigError(f"study {study.study.name}: {_first(error, Study)}") from None
    _check_modules(valid, f"study {study.study.name}")
    return valid


def _check_modules(study: Study, where: str) -> None:
    """Check that strategy and objective accept their options and fit each other. Errors:
    ConfigError that begins with `where`."""
    from fedtune.core.strategy import build_strategy

    try:
        strategy, objective = build_strategy(study), study.objective.resolved
        if strategy.of_statistics != (objective.directions > 0):
            raise ConfigError(
                f"objective.name = {study.objective.name!r} and strategy.name = "
                f"{study.strategy.name!r} do not fit: one works on class statistics, "
                "the other on adapter updates",
                'objective "prototypes" with strategy "discriminant", or neither',
            )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.happened}", error.expected, error.todo) from None


def study_from_json(text: str) -> Study:
    """Parse a plan received over the wire. Errors: ConfigError."""
    try:
        return Study.model_validate_json(text)
    except ValidationError as error:
        line = f"the plan received: {_first(error, Study)}"
        raise ConfigError(line, todo="compare fedtune versions") from None


def _load(kind: type[T], path: Path, settings: Iterable[str] = ()) -> T:
    expected, writer, explained = EXPECTED[kind]
    tables = reading.toml_in(path, expected, f"{writer} writes one", ConfigError)
    settings = tuple(settings)
    tables = overridden(tables, settings)
    try:
        loaded = kind.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        where = f"{path} with --set" if settings else str(path)
        line = f"{where}: {_first(error, kind)}"
        raise ConfigError(line, todo=f"see {explained}") from None
    return loaded.anchored(path.resolve().parent)


def _suggest_key(kind: type[BaseModel], steps: list[str]) -> str:
    """Suggest the known key that a mistyped one resembles, as in ' (did you mean rounds?)'; "" if
    there is none. kind: the class of the outermost table. steps: the keys that lead from there to
    the mistyped one."""
    table: Any = kind
    for step in steps[:-1]:
        if step not in table.model_fields:  # the name of one of several tables
            continue
        field = table.model_fields[step].annotation
        table = next(t for t in (field, *get_args(field)) if hasattr(t, "model_fields"))
    near = difflib.get_close_matches(steps[-1], table.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _first(error: ValidationError, kind: type[BaseModel]) -> str:
    """Describe the first problem of a validation in one line: the key, what is wrong with it, and
    how many more problems there are. kind: the class of the outermost table."""
    problems = [p for p in error.errors() if "literal['off']" not in p["loc"]]
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")  # a typo explains a missing key
    first = problems[0]
    alternatives = ("PrivacyTable", "tuple[")  # types of a union, which are no keys of the file
    steps = [str(s) for s in first["loc"] if not str(s).startswith(alternatives)]
    key = ".".join(steps)[:MOST_KEY]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = message.replace("a valid array", "a list").replace("an object", "a table")
    if first["type"] == "missing":
        message = "key is missing"
    elif first["type"] == "extra_forbidden":
        message = "unknown key" + (_suggest_key(kind, steps) if len(key) < MOST_KEY else "")
    elif first["type"] == "string_pattern_mismatch":
        message = WORDS.get(first["ctx"]["pattern"], message)
    elif key == "privacy":
        message = 'must be a [privacy] table, or privacy = "off" above the first table'
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {message}{more}" if key else f"{message}{more}"
