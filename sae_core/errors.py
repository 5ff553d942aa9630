"""The one exception a user is meant to read."""


class SAEError(Exception):
    """A fault that the user can mend.

    The message is one line that names the file, key or option at fault and says what to do.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at a point from which the same command goes on with it."""
