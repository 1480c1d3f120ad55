"""What users are told: the one exception that they are meant to see, and counted nouns."""


class UserError(Exception):
    """Something the user can put right; the scripts print it as one line and exit with status 2."""


def plural(count: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
