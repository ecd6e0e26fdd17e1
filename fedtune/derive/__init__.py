"""Derive new models from finished runs, after their ε was paid."""
