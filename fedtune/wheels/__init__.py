"""Make bases from PyPI wheels, in a process of its own."""
