"""The code by which fedtune uses Flower, be it for a study in one process, in several processes, or
across hospitals."""
