"""A site's own model: a released one, trained further on the site's records, for use there
alone."""
