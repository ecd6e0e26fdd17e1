"""Clips of a disc that moves: an example of video columns."""
