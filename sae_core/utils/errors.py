"""The one exception that a user is meant to read, and any other exception as one line."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the messages of torch's errors that have no class of their own."""


class SAEError(Exception):
    """A fault that the user can fix.

    The message is one line that names the file, key or option at fault and says what to do.
    """


class PassingError(SAEError):
    """A fault of a network, a service or a disk, which may be gone at the next attempt."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at a point from which the same command can continue."""


def one_line(error: object, most: int = 300) -> str:
    """What an error, or its message, says: one line without control characters, of at most `most`
    characters; the error's name if it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)[:most]


def is_unicode(text: str) -> bool:
    """Whether a text consists of characters. Halves of surrogate pairs are not characters; in file
    names they represent bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or the machine ran out of memory. Recognised by the name of torch's
    class, so that torch need not be imported."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in names or any(sign in str(error) for sign in OUT_OF_MEMORY)
