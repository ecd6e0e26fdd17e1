"""A round at a site: per-unit gradients are clipped, summed and noised."""
