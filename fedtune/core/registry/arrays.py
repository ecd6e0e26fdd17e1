"""Names of arrays that several packages read: on the wire and in checkpoints."""

# Class statistics (objective.directions): the sums that a site sends, (K, k + 1), and the public
# basis (k, H) and mean (H,) of its features.
CLASS_SUMS = "statistics.weight"
CLASS_BASIS = "statistics.basis"
CLASS_MEAN = "statistics.mean"
MOST_DIRECTIONS = 4096  # the largest k that a plan may have
