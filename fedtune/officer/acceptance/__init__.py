"""Judge a finished model at a site on the site's own held-out records. The figures have no noise
and stay at the site."""
