"""Runnable examples; each makes its own data from a seed."""
