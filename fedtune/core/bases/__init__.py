"""A base model: where it is found, and what its parts are."""
