"""What every language model that answers has in common, and how its requests can fail."""

from typing import NamedTuple, Protocol

from sae_core.labelling.prompts import Question

BYTES_PER_TOKEN = 4
"""Of English text, for estimates."""


class Reply(NamedTuple):
    """An answer, and what it took."""

    text: str
    tokens_in: int
    tokens_out: int
    is_cut_off: bool = False
    """Whether it ends at the ceiling on the tokens of an answer."""


class Chat(Protocol):
    """A language model that can be asked."""

    where: str
    """Where it runs and who reads the texts, as the log says it."""

    async def ask(self, question: Question) -> Reply:
        """Send a request once.

        Raises:
            Busy: it may be answered later.
            Refused: this one is not answered; others may be.
            SAEError: none will be.
        """

    async def close(self) -> None:
        """Nothing more will be asked."""


class Busy(Exception):
    """A request that failed, and may be answered later."""

    def __init__(self, reason: str, wait: float | None = None, was_read: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        """Seconds that the endpoint asks to wait."""
        self.was_read = was_read
        """Whether it may have been answered, and charged, all the same."""


class Refused(Exception):
    """A request that is not answered, however often it is sent."""


def estimated_tokens(n_bytes: int) -> int:
    """Tokens of a text of this length."""
    return -(-n_bytes // BYTES_PER_TOKEN)
