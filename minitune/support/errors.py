"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can put right; the scripts print it as one line and exit with status 2."""
