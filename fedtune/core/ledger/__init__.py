"""What a site has spent, on disk, before anything is released."""
