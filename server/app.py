"""The ServerApp that Flower starts at the coordinator, by its name in pyproject.toml."""

from fedtune.server.app import app

__all__ = ["app"]
