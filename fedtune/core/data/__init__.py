"""A site's records: read, check, tokenise, cap per unit. Content never reaches a message."""
