"""`make release`: every file of a release, built twice, tried alone, stated, signed and checked."""
