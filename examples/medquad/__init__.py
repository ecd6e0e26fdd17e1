"""Nine sources of consumer-health answers; the unit of privacy is the document."""
