"""The coordinator: admission, rounds, the store and what is released."""
