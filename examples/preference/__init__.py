"""Pairs of a better and a worse answer at three sites: one generated set, three real ones."""
