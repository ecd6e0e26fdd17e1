"""Find the site file of one of Flower's nodes."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context

from fedtune.core.errors import ConfigError
from fedtune.officer.site_files import sites_in


def site_file(context: Context) -> str:
    """Return the path of a node's site file: node_config["site"] or, in Flower's simulation, the
    file with the number of the node's partition in the folder run_config["sites"]. Errors:
    ConfigError."""
    path = context.node_config.get("site")
    if path is not None:
        return str(path)
    folder, number = context.run_config.get("sites"), context.node_config.get("partition-id")
    if folder is None or number is None:
        raise ConfigError(
            "this node was started without the path of its site file",
            'site = "PATH" in node_config',
        )
    files = sites_in(Path(str(folder)))
    if not 0 <= int(number) < len(files):
        raise ConfigError(f"{folder}: no site file for partition {number}")
    return str(files[int(number)])
