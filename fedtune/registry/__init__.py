"""Plug-ins: what a name in study.toml or site.toml stands for.

A plug-in is a dataclass whose fields are its options. It is a module of this release, or an entry
point of a distribution that is installed beside it, and is imported when asked for by its name."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Generic, TypeVar

from fedtune.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Group(Generic[T]):
    """All plug-ins of one kind. key: where a configuration names one, as "objective.name"; package:
    with one module for each of this release; kind: what their classes extend.

    A foreign one is an entry point of the group "fedtune.NAME". A name of this release always means
    the release's own.
    Guarantee: a foreign plug-in is imported by `load` and `build` alone, and then the one asked
    for."""

    name: str
    key: str
    package: str
    kind: type[T]

    def release(self) -> list[str]:
        """Every plug-in of this release. Nothing of them is imported."""
        path = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def installed(self) -> list[str]:
        """Every foreign plug-in that is installed. Nothing of them is imported."""
        own, points = self.release(), metadata.entry_points(group=f"fedtune.{self.name}")
        return sorted({point.name for point in points} - set(own))

    def load(self, name: str) -> type[T]:
        """The class of the plug-in `name`.

        | a foreign name that two distributions offer | ConfigError: nobody knows which is meant |
        Errors: ConfigError listing the names there are, or where it is none of this kind."""
        if name in self.release():
            return self._of_module(f"{self.package}.{name}")
        points = metadata.entry_points(group=f"fedtune.{self.name}", name=name)
        if not points:
            expected = "one of " + ", ".join([*self.release(), *self.installed()])
            raise ConfigError(f"{self.key} = {name!r} is not known", expected)
        if len(points) > 1:
            offers = ", ".join(sorted(point.value for point in points))
            raise ConfigError(f"{self.key} = {name!r} is installed more than once ({offers})")
        (point,) = points
        try:
            found = point.load()
        except Exception as error:  # whatever the other distribution's code does when imported
            raise ConfigError(
                f"{self.key} = {name!r}: {point.value} cannot be imported "
                f"({type(error).__name__}: {error})"
            ) from error
        if not (isinstance(found, type) and issubclass(found, self.kind)):
            raise ConfigError(
                f"{self.key} = {name!r}: {point.value} is none of the fedtune.{self.name}",
                f"a class that extends {self.kind.__module__}.{self.kind.__qualname__}",
            )
        return found

    def build(self, name: str, options: Mapping[str, Any], **given: Any) -> T:
        """The plug-in `name` with its options. given: fields that `kind` itself has.

        Errors: ConfigError as `load` has it; or listing the options, or by a value of one."""
        found: Any = self.load(name)
        own = {field.name for field in dataclasses.fields(found)}
        own -= set(getattr(self.kind, "__dataclass_fields__", ()))
        known = {field.name: field for field in dataclasses.fields(found) if field.name in own}
        at = self.key.rpartition(".")[0] + ".options"
        for option, value in options.items():
            if option not in known:
                expected = "one of " + ", ".join(known) if known else "no options"
                raise ConfigError(f"{at}.{option} is not known", expected)
            default = known[option].default
            if default is not dataclasses.MISSING and _sort(default) is not _sort(value):
                raise ConfigError(f"{at}.{option} = {value!r}", f"such as {default!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{at}.{option} = {value!r}", "a finite number")
        options = {
            option: int(value)
            if type(known[option].default) is int and float(value).is_integer()
            else value
            for option, value in options.items()
        }
        for option, field in known.items():
            if option not in options and field.default is dataclasses.MISSING:
                raise ConfigError(f"{at}.{option} is missing", f"a value; {name} has no default")
        built: T = found(**given, **options)
        return built

    def _of_module(self, path: str) -> type[T]:
        module = importlib.import_module(path)
        (found,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.kind)
            and value.__module__ == module.__name__
        )
        return found


def _sort(value: object) -> type:
    """What TOML tells apart: a text, a truth, a number."""
    return type(value) if isinstance(value, str | bool) else float


def summary(plugin: type) -> str:
    """The first paragraph of the class's docstring, on one line."""
    return " ".join((plugin.__doc__ or "").partition("\n\n")[0].split())
