"""Write study.toml and site.toml."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedtune.core.config.site import Site
from fedtune.core.config.study import Study
from fedtune.core.files.writing import replace


def save(table: Study | Site, path: Path | str) -> Path:
    """Write a study or a site to a TOML file, and return the file's path. Loading the file gives an
    equal object.

    Default values are written too, so that a release with other defaults reads the same study. Only
    the settings that a plan omits at their default, so that its digest stays the same, are not
    written. Relative paths are taken from the current folder and written absolute. Only this user
    can read a site's file (0600).

    >>> import fedtune
    >>> study_file, site_file = fedtune.init("my-study")
    >>> study = fedtune.load_study(study_file)
    >>> fedtune.load_study(fedtune.save(study, study_file.with_name("copy.toml"))) == study
    True

    Errors: InfrastructureError if the file cannot be written."""
    tables = table.anchored(Path.cwd()).model_dump(mode="json", exclude_none=True)
    return replace(Path(path), tomli_w.dumps(tables).encode(), private=isinstance(table, Site))
