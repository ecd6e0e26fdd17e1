"""Differential privacy: sampling, clipping, noise and accounting, which only `plan` combines."""
