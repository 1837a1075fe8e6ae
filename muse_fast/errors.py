"""The error that a user can mend."""


class UserError(ValueError):
    """Something in the input or the settings is wrong; the message says what, where, and what to do.

    Commands show the message without a traceback and exit with code 2.
    """
