"""The ClientApp that runs at a site."""
