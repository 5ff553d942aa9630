"""How a training batch is computed, and what comes out: a reconstruction, and an auxiliary loss.

Shapes: N tokens, F features, D activation width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae import losses
from sae_core.sae.precision import Precision
from sae_core.sae.sparse_code import SparseCode, Weights


class Compute(NamedTuple):
    """How a training batch is computed. All but `group` change the result by roundings at most."""

    row_block: int | None = None
    """Bounds the tokens whose pre-activations are in memory at once."""
    precision: Precision | None = None
    """Of the encoder product; None for the weights' own number format."""
    group: ProcessGroup = SINGLE_PROCESS
    """The processes that share the batch, each with its own tokens."""
    n_tokens: int | None = None
    """Tokens of all processes, which know it without asking each other; None for those of one."""
    lower_bound: float = 0.0
    """A guess at the smallest pre-activation that a top-k over the batch keeps."""
    aux_lower_bound: float = 0.0
    """The same of the auxiliary loss."""

    def total(self, x: Tensor) -> int:
        """Tokens of the batch of which this process has x."""
        assert self.group.is_single or self.n_tokens is not None
        return len(x) if self.n_tokens is None else self.n_tokens

    def products(self, x: Tensor) -> Precision | None:
        """The precision of what is multiplied besides a batch top-k's encoder product. On a CPU it
        is that of the weights, whatever the setting, as it has always been there."""
        return None if x.device.type == "cpu" else self.precision

    def values(self, x: Tensor) -> torch.dtype:
        """The number format of a dense code of x (N, D)."""
        precision = self.products(x)
        return precision.value_dtype if precision else x.dtype


PLAIN = Compute()


class Reconstruction(NamedTuple):
    """A batch, encoded and decoded, and what the loss needs to know of it."""

    x_hat: Tensor
    """(N, D) reconstruction."""
    l1: Tensor
    """Scalar: mean L1 norm of the code, which `l1_coefficient` weights."""
    l0: float
    """Mean number of active features per token."""
    fired: Tensor
    """(F,) bool: the features that are active on some token."""
    kind_loss: Tensor
    """Scalar: the term that only this kind adds to the loss; 0 for most."""
    least: float | None = None
    """The smallest pre-activation that a top-k over the batch kept; None without one."""

    @classmethod
    def of_code(
        cls, code: SparseCode, x_hat: Tensor, kind_loss: Tensor | None = None
    ) -> "Reconstruction":
        """With the figures of a code that is given as pairs."""
        return cls(
            x_hat=x_hat,
            l1=losses.l1_loss(code.value, code.pairs.n_rows),
            l0=len(code.value) / code.pairs.n_rows,
            fired=code.pairs.counts() > 0,
            kind_loss=x_hat.new_zeros(()) if kind_loss is None else kind_loss,
        )


class AuxiliaryLoss(NamedTuple):
    """The auxiliary loss of a batch, computed on copies of the dead features' weights.

    Computed on the weights themselves, the gradient would be zero but for a few rows and cost as
    much as the rest of the step. So after `backward` the copies have it, and `add_gradient` adds it
    to the weights' gradients.
    """

    loss: Tensor
    """Scalar; 0 without dead features."""
    least: float | None = None
    """The smallest dead pre-activation that was kept; None without dead features."""
    dead: Tensor | None = None
    """(F_dead,) the dead features."""
    copies: tuple[Tensor, ...] = ()
    """Of their rows of `W_enc.T`, `b_enc` and `W_dec`."""

    @torch.no_grad()
    def add_gradient(self, weights: Weights) -> None:
        """Add the copies' gradient to that of the weights (`sae.weights`)."""
        if self.dead is None:
            return
        assert weights.W_enc.grad is not None
        gradients = weights.W_enc.grad.T, weights.b_enc.grad, weights.W_dec.grad
        for gradient, rows in zip(gradients, self.copies, strict=True):
            assert gradient is not None and rows.grad is not None
            gradient[self.dead] += rows.grad
