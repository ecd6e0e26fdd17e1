"""Tasks of a person at a site: review, accept, withdraw, release answers, and inspect the
records."""
