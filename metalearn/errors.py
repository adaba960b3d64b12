"""What ends in one line and no traceback: a user's mistake (exit code 2), a run that cannot go on (1)."""


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class RunFailed(Exception):
    """A run that cannot go on: one line, exit code 1."""


class UserError(Exception):
    """What is wrong, where it was said, what would be right: in one line."""
