"""Differential privacy: sampling, clipping, noise and accounting, joined by `plan` alone."""
