"""Find, verify and load base models, and locate their parts."""
