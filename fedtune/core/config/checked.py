"""Keep the tables with which a person started a site: STATE/checked-site.json (0600).

When a person starts a site (`fedtune client` or `fedtune vault`), the site file is checked and,
after that, stored here with all that a hospital's home adds to it. Every vault process of that
start takes its tables from this file: the first one, one that is started again after an end, and
one that `vault.run` starts for a single request. So whatever is written into site.toml later, no
vault reads other records, pays from another ledger or states another size than a person had
checked. What may change meanwhile, the policy, each order reads from site.toml itself
(`core/vault/declared.with_new_policy`)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fedtune.core.config.site import Site
from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.core.files.writing import replace

CHECKED = "checked-site.json"  # in the state folder


def checked_file(site: Site) -> Path:
    """Return the path at which a site's checked tables are kept."""
    return site.site.state / CHECKED


def keep_checked(site: Site) -> Path:
    """Store the tables of a site, which was checked just now, and return the file's path. A file
    that holds the same tables already is left as it is, so that a restart takes no disk space.
    Errors: InfrastructureError if the file cannot be written."""
    path = checked_file(site)
    tables = site.model_dump(mode="json", exclude_none=True)
    content = json.dumps(tables, sort_keys=True, indent=1).encode()
    with suppress(OSError):
        if path.read_bytes() == content:
            return path
    return replace(path, content, private=True)


def load_checked(path: Path, site_file: Path) -> Site:
    """Return the site whose tables `keep_checked` stored at `path`. site_file: the site.toml from
    which they were loaded. Errors: ConfigError if there are none that this release can read."""
    todo = "stop this site and start it again, so that it is checked"
    expected = "the settings that were checked when this site was started"
    content = reading.content(path, expected, todo, kind=ConfigError, most=reading.SMALL)
    try:
        site = Site.model_validate_json(content)
    except ValidationError:
        raise ConfigError(f"{path}: cannot be read by this release", expected, todo) from None
    site._file = site_file.resolve()
    return site
