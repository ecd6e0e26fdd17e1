"""Differential privacy: sampling, clipping, noise and accounting. Only `plan` combines them."""
