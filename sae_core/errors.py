"""The one exception a user is meant to read."""


class SAEError(Exception):
    """A fault that the user can mend.

    The message is one line that names the file, key or option at fault and says what to do.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at a point from which the same command goes on with it."""


def one_line(error: BaseException) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
