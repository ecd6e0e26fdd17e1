"""Run client, server and Flower together, on one machine or on many."""
