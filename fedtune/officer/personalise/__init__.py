"""Train a released model further on a site's own records, for use at this site alone."""
