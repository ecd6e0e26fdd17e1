"""Read, check and tokenise a site's records, and cap them per unit. No message holds a
record's content."""
