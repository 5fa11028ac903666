"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """Bad input. The message names the file, key or value, what was expected and what to do.

    The command line prints it without a traceback.
    """
