"""FSDD: four speakers, ten digits."""
