"""fedtune: fine-tune a language model across hospitals without moving a record."""

__version__ = "0.1.0"
