"""Compute, before a study runs, the ε that it costs and how noisy its answers will be."""
