"""Resolve the name of a plug-in in study.toml or site.toml to a class.

A plug-in is a dataclass whose fields are its options. It is a module of this release, or an entry
point of a distribution that is installed beside it. It is imported when its name is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@dataclass(frozen=True)
class Group(Generic[T]):
    """All plug-ins of one kind.

    - name: the name of the kind, as in the group of entry points "fedtune.NAME"
    - key: the configuration's key that names a plug-in, such as "objective.name"
    - package: the package with one module for each plug-in of this release
    - kind: the class that plug-ins extend
    - foreign: whether other distributions may provide plug-ins, as entry points of the group

    If a foreign plug-in has the same name as a plug-in of this release, the name means the latter.
    Guarantee: a foreign plug-in is imported only by `load` and `build`, and only if it is the one
    that is asked for."""

    name: str
    key: str
    package: str
    kind: type[T]
    foreign: bool = True

    def release(self) -> list[str]:
        """Return the names of this release's plug-ins, without importing them or their package."""
        package = importlib.util.find_spec(self.package)
        path = (package.submodule_search_locations if package else None) or []
        return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))

    def installed(self) -> list[str]:
        """Return the names of the installed foreign plug-ins, without importing them."""
        return sorted({point.name for point in self._offered()} - set(self.release()))

    def load(self, name: str) -> type[T]:
        """Import and return the class of the plug-in `name`.

        Errors: ConfigError if no plug-in, or more than one, has the name, if it cannot be imported,
        or if it is not a class of this kind."""
        if name in self.release():
            return self._of_module(f"{self.package}.{name}")
        point = self.find(name)
        try:
            plugin = point.load()
        except Exception as error:  # whatever the other distribution's code does when imported
            raise ConfigError(
                f"{self.key} = {name!r}: {point.value} cannot be imported "
                f"({type(error).__name__}: {error})"
            ) from error
        return self._check_kind(name, point.value, plugin)

    def find(self, name: str) -> EntryPoint:
        """Return the entry point of the foreign plug-in `name`, i.e. of one that another
        distribution provides. The plug-in is not imported.

        Errors: ConfigError if no installed distribution, or more than one, offers the name."""
        points = [point for point in self._offered() if point.name == name]
        if not points:
            expected = "one of " + ", ".join([*self.release(), *self.installed()])
            raise ConfigError(f"{self.key} = {name!r} is not known", expected)
        if len(points) > 1:
            offers = ", ".join(sorted(point.value for point in points))
            raise ConfigError(f"{self.key} = {name!r} is installed more than once ({offers})")
        (point,) = points
        return point

    def _offered(self) -> Sequence[EntryPoint]:
        """Return the entry points of this kind that other distributions offer."""
        if not self.foreign:
            return ()
        from importlib import metadata  # here: it takes a tenth of the time of `fedtune --help`

        return tuple(metadata.entry_points(group=f"fedtune.{self.name}"))

    def _check_kind(self, name: str, value: str, plugin: object) -> type[T]:
        if not (isinstance(plugin, type) and issubclass(plugin, self.kind)):
            raise ConfigError(
                f"{self.key} = {name!r}: {value} is no plug-in of fedtune.{self.name}",
                f"a class that extends {self.kind.__module__}.{self.kind.__qualname__}",
            )
        return plugin

    def build(self, name: str, options: Mapping[str, Any], **kind_fields: Any) -> T:
        """Build the plug-in `name` with its options.

        - name: the plug-in's name in the configuration
        - options: values of the plug-in's own fields, by name, as the configuration states them
        - kind_fields: values of the fields that all plug-ins of this kind have

        Errors: ConfigError if the plug-in cannot be found or imported, or is no class of this kind;
        or if an option is unknown, missing or has a value of another type."""
        return self._instantiate(name, self.load(name), options, **kind_fields)

    def build_found(self, name: str, value: str, found: object, options: Mapping[str, Any]) -> T:
        """Build a plug-in from an object that is already loaded, without importing anything.

        - name: the plug-in's name in the configuration, for errors
        - value: the entry point from which the object was loaded, as "module:class", for errors
        - found: the object; it must be a class of this kind
        - options: values of the plug-in's fields, by name, as the configuration states them

        Errors: ConfigError if it is no such class, or an option is unknown, missing or has a value
        of another type."""
        return self._instantiate(name, self._check_kind(name, value, found), options)

    def _instantiate(
        self, name: str, plugin: Any, options: Mapping[str, Any], **kind_fields: Any
    ) -> T:
        option_names = {field.name for field in dataclasses.fields(plugin)}
        option_names -= set(getattr(self.kind, "__dataclass_fields__", ()))
        fields = {f.name: f for f in dataclasses.fields(plugin) if f.name in option_names}
        table = self.key.rpartition(".")[0] + ".options"
        for option, value in options.items():
            if option not in fields:
                expected = "one of " + ", ".join(fields) if fields else "no options"
                raise ConfigError(f"{table}.{option} is not known", expected)
            default = fields[option].default
            if default is not dataclasses.MISSING and _toml_kind(default) is not _toml_kind(value):
                expected = f"the type of its default, {default!r}"
                raise ConfigError(f"{table}.{option} = {value!r}", expected)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{table}.{option} = {value!r}", "a finite number")
            if type(default) is int and value != int(value):
                raise ConfigError(f"{table}.{option} = {value!r}", "a whole number")
        options = {  # a plan writes every number as a float
            option: int(value) if type(fields[option].default) is int else value
            for option, value in options.items()
        }
        for option, field in fields.items():
            if option not in options and field.default is dataclasses.MISSING:
                raise ConfigError(f"{table}.{option} is missing", f"a value; {name} has no default")
        built: T = plugin(**kind_fields, **options)
        return built

    def _of_module(self, path: str) -> type[T]:
        module = importlib.import_module(path)
        (plugin,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, self.kind)
            and value.__module__ == module.__name__
        )
        return plugin


def _toml_kind(value: object) -> type:
    """Return the class by which TOML tells kinds of values apart: str for a text, bool for a truth
    value, float for anything else, i.e. a number."""
    return type(value) if isinstance(value, str | bool) else float


def summary(plugin: type) -> str:
    """Return the first paragraph of the class's docstring, on one line."""
    return " ".join((plugin.__doc__ or "").partition("\n\n")[0].split())
