"""What a step of the training takes, and what it gives."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sae_core.end_to_end import CleanPass


class Batch(NamedTuple):
    """The tokens of one step."""

    x: Tensor
    """(N, D) activations as they enter the SAE, outliers left out."""
    n_outliers: int = 0
    passes: Sequence[CleanPass] = ()
    """The windows whose tokens they are; only in the end-to-end phase."""
    finite: bool = True
    """No activation is infinite or NaN."""
    target: Tensor | None = None
    """(N, D) of a transcoder, the target scaled likewise."""

    @property
    def wanted(self) -> Tensor:
        """(N, D) what is to be reconstructed."""
        return self.x if self.target is None else self.target


class Terms(NamedTuple):
    """The loss and what it is made of, scalar tensors."""

    loss: Tensor
    recon_loss: Tensor
    l1_loss: Tensor
    recon_contribution: Tensor
    l1_contribution: Tensor
    aux_loss: Tensor
    kind_loss: Tensor
    end_to_end: dict[str, Tensor]
    """What the phase adds, by its names in the history; without gradients."""

    def by_name(self) -> dict[str, Tensor]:
        """All of them, by the names in the history."""
        terms = self._asdict()
        return terms | terms.pop("end_to_end")

    def detached(self) -> "Terms":
        """For the record."""
        *terms, end_to_end = self
        return Terms(*(term.detach() for term in terms), end_to_end)
