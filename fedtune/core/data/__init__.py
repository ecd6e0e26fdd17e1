"""Read, check and tokenise a site's records, and cap them per unit. Content never reaches a
message."""
