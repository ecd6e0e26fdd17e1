"""What runs at a site: the ClientApp, the site's worker and its policy."""
