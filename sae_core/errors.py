"""The one exception a user is meant to read, and any other as a line."""

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In the messages of torch's errors that have no class of their own."""


class SAEError(Exception):
    """A fault that the user can mend.

    The message is one line that names the file, key or option at fault and says what to do.
    """


class PassingError(SAEError):
    """A fault that may be gone at the next attempt: of a network, a service or a disk."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work at a point from which the same command goes on with it."""


def one_line(error: object, most: int = 300) -> str:
    """What an error, or its message, says: one line without control characters, of at most `most`
    characters; the error's name if it says nothing."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)[:most]


def is_unicode(text: str) -> bool:
    """Whether all of a text are characters: halves of surrogate pairs are none, and stand in names
    of files for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory, of the device or of the machine, is what was lacking. By torch's name for
    it, so that what needs no torch need not import it."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in names or any(sign in str(error) for sign in OUT_OF_MEMORY)
