"""Read and write files with bounds, completely or not at all."""
