"""Show pages in a browser on this machine: a run, a folder of runs, a coordinator, a site, a
dossier.

    kinds.py      what a path is, and which page shows it
    pages/        one file a kind: from files to what its template shows
    work.py       what takes scipy and seconds (a ledger, a review, a verification), in a child
    server.py     the token, the headers, live events; templates/ and static/ beside it

Guarantee: files are read and none is written; no request goes to another machine; a request
without the token gets 401; the pages show what `fedtune status`, `ledger`, `log`, `review` and
`verify` show.
"""
