"""Keep account of the homes on this machine. A home is a folder with a ledger. This package records
from which home's ledger which records are paid, and checks that a home's ledger is still there
before it is opened."""
