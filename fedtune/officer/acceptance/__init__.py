"""Judge a finished model at a site, on its own held-out records: exact figures that stay there."""
