"""A site: what it admits, trains, answers and keeps."""
