"""The one exception for a user's mistake: a single line, exit code 2, no traceback."""


class UserError(Exception):
    """What is wrong, where it was said, what would be right: in one line."""
