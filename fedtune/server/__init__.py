"""The coordinator: admission, rounds, the store and the released model."""
