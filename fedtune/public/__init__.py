"""Compute the start of a plan at the coordinator, from public records alone; it costs no ε."""
