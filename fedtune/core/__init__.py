"""All code that must be right for ε: the modules that a vault, which holds the records, can load.

This package imports nothing of fedtune outside itself but the version, and nothing that serves or
calls over a network. An import contract and a test of real processes check this. (A database's
client uses a network, and so does pip, which fetches a base before a study.)
docs/what-must-be-right.md lists each file.
"""
