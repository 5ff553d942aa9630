"""What a step of the training takes, and what it gives."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from sae_core.end_to_end import CleanPass


class Batch(NamedTuple):
    """The tokens of one step."""

    x: Tensor
    """(N, D) activations as they enter the SAE, outliers left out."""
    n_outliers: int = 0
    passes: Sequence[CleanPass] = ()
    """The windows whose tokens this process has; only in the end-to-end phase."""
    finite: bool = True
    """No activation is infinite or NaN."""
    target: Tensor | None = None
    """(N, D) of a transcoder, the target scaled likewise."""
    own: slice = slice(None)
    """The tokens that this process works on."""

    def part(self) -> "Batch":
        """The same with the process's own tokens alone."""
        target = self.target
        return self._replace(
            x=self.x[self.own], target=None if target is None else target[self.own]
        )

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

    def mapped(self, of: Callable[[Tensor], Tensor]) -> "Terms":
        """The same of each."""
        *terms, end_to_end = self
        return Terms(*map(of, terms), {name: of(term) for name, term in end_to_end.items()})

    def detached(self) -> "Terms":
        """For the record."""
        return self.mapped(Tensor.detach)
