"""Read, check and tokenise a site's records, and limit how many of one unit take part. No error or
log message holds a record's content."""
