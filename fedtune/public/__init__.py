"""Compute the start of a plan at the coordinator, from public records alone. This costs no ε."""
