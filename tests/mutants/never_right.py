"""A test that no code passes, for the test of the runner; it is in no file that pytest collects."""


def test_that_fails() -> None:
    raise AssertionError
