"""The command line inside the test's own process."""

from pipelines.__main__ import main


def grm(*arguments: object) -> int:
    """The exit status of `grm ARGUMENTS`."""
    return main([*map(str, arguments)])
