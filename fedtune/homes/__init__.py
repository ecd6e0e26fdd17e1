"""Keep account of the homes on this machine. A home is a folder with a privacy ledger. This package
notes which home's ledger is charged for which records, and checks that the ledger is still there
before it is opened."""
