"""Measure quality on public records."""
