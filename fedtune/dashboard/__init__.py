"""Show pages in a browser on this machine: a run, a folder of runs, a coordinator, a site, a
dossier.

    kinds.py      decides which page shows a path
    pages/        has one file for each kind of page, which reads files into the template's values
    work.py       computes, in a child process, the results that take seconds: a ledger, a review,
                  a verification
    server.py     serves pages with token, headers and live events, from templates/ and static/

Guarantee: files are read and none is written. No request goes to another machine. A request without
the token is answered by 401. The pages show the same as `fedtune status`, `ledger`, `log`, `review`
and `verify`."""
