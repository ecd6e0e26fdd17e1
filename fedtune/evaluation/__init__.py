"""Measure, on public records, how good a model is."""
