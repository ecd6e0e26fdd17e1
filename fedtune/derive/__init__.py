"""Derive new models from finished runs, which costs no further ε, and label a site's own
prompts."""
