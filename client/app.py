"""The ClientApp that Flower starts at a site, by its name in pyproject.toml."""

from fedtune.launch.in_one_process import app

__all__ = ["app"]
