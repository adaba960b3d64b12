"""The one exception for a user's mistake: a single line, exit code 2, no traceback."""


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """What is wrong, where it was said, what would be right: in one line."""
