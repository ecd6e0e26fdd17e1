"""Derive new models from finished runs, which costs no further ε, and label preferences for a
site's own prompts."""
