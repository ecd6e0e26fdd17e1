"""Show pages in a browser on this machine: a run, a folder of runs, a coordinator, a site, a
dossier.

    kinds.py      find out what a path is, and which page shows it
    pages/        one file for each kind of page: reads files into the values for its template
    work.py       computes in a child process what needs scipy and seconds: a ledger, a review, a
                  verification
    server.py     serves pages with token, headers and live events; templates/ and static/ beside it

Guarantee: files are read and none is written; no request goes to another machine; a request without
the token is answered by 401; the pages show the same as `fedtune status`, `ledger`, `log`, `review`
and `verify`.
"""
