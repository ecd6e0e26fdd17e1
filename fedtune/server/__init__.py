"""The coordinator's code: admission, rounds, the checkpoint and the released model."""
