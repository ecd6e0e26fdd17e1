"""All code that must be right for ε: what the process that holds a site's records can load.

It imports nothing of fedtune outside this package but its version, and nothing that serves or
calls over a network; a contract of the imports and a test of real processes hold it to that. (A
database's client and pip, which fetches a base before a study, do use one.)
docs/what-must-be-right.md lists each file.
"""
