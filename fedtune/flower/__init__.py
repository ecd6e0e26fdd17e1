"""The code that uses Flower, for a study in one process, in several processes, or across
hospitals."""
