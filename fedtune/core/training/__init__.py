"""A round at a site: per-unit gradients, clipped, noised and summed."""
