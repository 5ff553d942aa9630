"""The terms of the loss, each a scalar tensor. Shapes: N tokens, D activation width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of the squared error `||x - x_hat||^2`, both (N, D).

    The trainer scales activations to `E||x||^2 = 1`, so that this is close to the fraction of
    variance unexplained.
    """
    return F.mse_loss(x_hat, x, reduction="sum") / len(x)


def l1_loss(values: Tensor, n_tokens: int) -> Tensor:
    """Mean over tokens of the code's L1 norm; `values` are its non-negative entries.

    Decoder rows have unit norm, so no feature can shrink its code by growing its row.
    """
    return values.sum() / max(n_tokens, 1)


def normalised_residual_loss(residual: Tensor, prediction: Tensor) -> Tensor:
    """Squared error of `prediction` over the residual's own variance, both (N, D).

    The auxiliary loss of Gao et al. (arXiv 2406.04093, section A.2): 1 when dead features explain
    nothing of what the live ones left over; 0 when nothing is left over.
    """
    residual = residual.detach()
    mean = residual.mean(0).expand_as(residual)
    variance = F.mse_loss(mean, residual, reduction="sum")
    error = F.mse_loss(prediction, residual, reduction="sum")
    return torch.where(variance > 0, error / variance.clamp(min=1e-30), torch.zeros_like(error))


def fraction_of_variance_unexplained(
    squared_error: Tensor | float, squared: Tensor, total: Tensor, n_tokens: int
) -> float:
    """Pooled FVU `sum ||x - x_hat||^2 / sum ||x - mean(x)||^2` over all tokens.

    Pooled, not a mean of per-token ratios: from the sums over tokens of the squared error, of
    `||x||^2` (scalar) and of `x` (D,).
    """
    variance = float(squared) - float(total.double().pow(2).sum()) / n_tokens
    return float(squared_error) / max(variance, 1e-30)
