"""The client app (ClientApp) that Flower starts at a site; pyproject.toml gives Flower its name."""

from fedtune.launch.in_one_process import app

__all__ = ["app"]
