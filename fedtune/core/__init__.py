"""All code that must be right for ε: what the process that holds a site's records can load.

It imports nothing of fedtune outside this package, and no network; a contract of the imports and a
test of real processes hold it to that. docs/what-must-be-right.md lists each file.
"""
