"""The process that forks a child for each unit's conversion; core/data/conversion.py starts it.

It reads no row, and runs no code of the plug-in. It finds the plug-in's modules and keeps their
source text in memory, since a child may open no file."""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec
from pathlib import Path
from types import CodeType
from typing import Any

from fedtune.core.data import child_process
from fedtune.core.data.converters import CONVERTERS, Converter
from fedtune.core.data.typed_rows import given_rows, returned_bytes
from fedtune.core.errors import ConfigError

TEXT = 64 * 2**20  # most bytes of the modules of the plug-in and of what it requires
TRUSTED = ("numpy",)  # imported here if a plug-in requires it: its code is trusted anyway
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# fmt: off
# The modules of the standard library that a conversion may import.
PREPARED = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "bz2", "calendar", "codecs",
    "collections", "collections.abc", "configparser", "contextlib", "copy", "csv", "ctypes",
    "dataclasses", "datetime", "decimal", "difflib", "email", "email.message", "email.parser",
    "email.policy", "encodings", "enum", "fnmatch", "fractions", "functools", "gzip", "hashlib",
    "heapq", "hmac", "html", "html.entities", "html.parser", "io", "ipaddress", "itertools",
    "json", "keyword", "locale", "logging", "lzma", "math", "numbers", "operator", "os.path",
    "pathlib", "pprint", "quopri", "random", "re", "reprlib", "secrets", "shlex", "statistics",
    "string", "stringprep", "struct", "textwrap", "threading", "time", "traceback", "types",
    "typing", "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "xml.dom.minidom",
    "xml.etree.ElementTree", "xml.sax", "zlib", "_strptime", "__future__",
)
# fmt: on


def main() -> None:
    """Run this process: fork children that convert rows. The plug-in and its options are those of
    [data.convert]. If the plug-in cannot be used, tell the process that started this one."""
    control, table = child_process.begin()
    for name in (*PREPARED, *_encodings()):
        with suppress(ImportError):
            importlib.import_module(name)
    try:
        point = CONVERTERS.find(table["name"])
        plugin = _PlugIn(table["name"], point.value, table["options"], _Modules(point))
    except ConfigError as error:
        child_process.say(control, "settings", str(error))
        return
    gc.freeze()  # so that a child does not copy what it never changes
    child_process.serve(control, plugin.convert, table)


def _encodings() -> Iterator[str]:
    import encodings
    import pkgutil

    return (f"encodings.{module.name}" for module in pkgutil.iter_modules(encodings.__path__))


# ------------------------------------------------------------------------------------ the plug-in


class _PlugIn:
    """A plug-in that was found by its entry point, and is imported by a child only.

    - name: the plug-in's name in site.toml
    - value: the entry point's value, "MODULE:ATTRIBUTE"
    - options: those of [data.convert.options]
    - modules: the plug-in's modules, from which a child imports it"""

    def __init__(
        self, name: str, value: str, options: Mapping[str, Any], modules: _Modules
    ) -> None:
        self._name = name
        self._value = value
        self._options = options
        self._modules = modules

    def convert(self, given: bytes) -> bytes:
        """Convert one unit's rows, in a child. given: the rows, encoded; the result is the
        converted rows, encoded. If `given` is empty, the result is the JSON that `Children` reads
        at its start: "ready", or the reason why the plug-in does not accept its options."""
        sys.meta_path = [BuiltinImporter, FrozenImporter, self._modules]
        if given:
            return returned_bytes(self._build().convert(given_rows(given)))
        try:
            self._build()
        except ConfigError as error:
            return json.dumps({"kind": "settings", "text": str(error)}).encode()
        return json.dumps({"kind": "ready"}).encode()

    def _build(self) -> Converter:
        module, _, attribute = self._value.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:
            raise ConfigError(
                f"data.convert.name = {self._name!r}: {self._value} cannot be imported "
                f"({type(error).__name__}: {error})",
                "a plug-in that imports only its own modules, packages that it requires, and the "
                "standard library's modules for text, numbers and dates",
            ) from None
        return CONVERTERS.build_found(self._name, self._value, found, self._options)


class _Modules(importlib.abc.InspectLoader, importlib.abc.MetaPathFinder):
    """The modules of a plug-in's distribution and of the distributions that it requires. The
    process that forks finds, reads and compiles them; only a child runs them."""

    def __init__(self, point: metadata.EntryPoint) -> None:
        self._texts, self._packages = dict[str, bytes](), set[str]()
        self._codes = dict[str, CodeType]()
        self._length = 0
        required = _list_required(point)
        for name in TRUSTED:
            if name in required:
                importlib.import_module(name)
        for top in (point.value.partition(":")[0].partition(".")[0], *_top_levels(required)):
            if top not in sys.modules:
                self._add(top)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._codes:
            return None
        package = fullname in self._packages
        return importlib.util.spec_from_loader(fullname, self, is_package=package)

    def is_package(self, fullname: str) -> bool:
        return fullname in self._packages

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._texts[fullname])

    def get_code(self, fullname: str) -> CodeType | None:
        return self._codes.get(fullname)

    def _add(self, top: str) -> None:
        spec = importlib.util.find_spec(top)  # the name has no dot, so nothing is imported
        if spec is None:
            return
        if not spec.submodule_search_locations:
            if spec.origin and spec.origin.endswith(".py"):
                self._read(top, Path(spec.origin), is_package=False)
            return
        for folder in map(Path, spec.submodule_search_locations):
            for path in sorted(folder.rglob("*.py")):
                parts = (top, *path.relative_to(folder).with_suffix("").parts)
                is_package = parts[-1] == "__init__"
                name = ".".join(parts[:-1] if is_package else parts)
                self._read(name, path, is_package)

    def _read(self, name: str, path: Path, is_package: bool) -> None:
        text = path.read_bytes()
        self._length += len(text)
        if self._length > TEXT:
            raise ConfigError(
                f"the plug-in that data.convert names, with what it requires, has more than "
                f"{TEXT >> 20} MiB of modules"
            )
        with suppress(SyntaxError, ValueError):  # no valid code, so that no child can import it
            self._codes.setdefault(name, compile(text, str(path), "exec", dont_inherit=True))
        self._texts.setdefault(name, text)
        if is_package:
            self._packages.add(name)


def _list_required(point: metadata.EntryPoint) -> set[str]:
    """Return the names of the distributions that the plug-in's distribution requires, directly or
    indirectly, without fedtune. point: the plug-in's entry point."""
    waiting, found = _requirements(point.dist), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found and name != "fedtune":
            found.add(name)
            with suppress(metadata.PackageNotFoundError):
                waiting += _requirements(metadata.distribution(name))
    return found


def _requirements(distribution: metadata.Distribution | None) -> list[str]:
    lines = (distribution.requires if distribution else None) or []
    matches = (_NAME.match(line) for line in lines if "extra ==" not in line)
    return [_normalise_name(match[0]) for match in matches if match]


def _top_levels(required: set[str]) -> list[str]:
    """Return the names of the top-level modules and packages of some distributions. required: the
    distributions' names."""
    if not required:
        return []
    named = metadata.packages_distributions().items()
    return [top for top, owners in named if required & {_normalise_name(owner) for owner in owners}]


def _normalise_name(name: str) -> str:
    """Return a distribution's name in the form in which two names are compared: in lower case, and
    with "-" for each run of "-", "_" and "."."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
