"""The error that a command line shows as one sentence."""


class UserError(ValueError):
    """Input that a user can put right; the message names it and says how."""
