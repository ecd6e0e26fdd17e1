"""The code that uses Flower: in one process, in several processes, or across hospitals."""
