"""The ClientApp that Flower starts at a site, by its name in pyproject.toml."""

from fedtune.client.app import app

__all__ = ["app"]
