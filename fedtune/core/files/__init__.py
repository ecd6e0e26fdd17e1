"""Read files up to a bound, and write files completely or not at all."""
