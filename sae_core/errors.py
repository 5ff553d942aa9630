"""The one exception a user is meant to read, and what can be told of others without torch."""

SIGNS = ("DefaultCPUAllocator: ", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the messages of the errors that have no class of their own."""


class SAEError(Exception):
    """A fault that the user can mend.

    The message is one line that names the file, key or option at fault and says what to do.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at a point from which the same command goes on with it."""


def one_line(error: BaseException) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory, of the device or of the machine, is what was lacking."""
    # torch.OutOfMemoryError by its name: rules without torch end by this, too.
    named = type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in SIGNS)
