"""Studies on pairs of a better and a worse answer at three sites, from one generated data set and
three real ones."""
