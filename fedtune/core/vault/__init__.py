"""The site's process that holds the records: it admits, charges, trains and answers."""
