"""Adam for an SAE: the decoder has a larger learning rate, and gradients are of bounded length."""

import torch
from torch import Tensor

from sae_core.sae.static.moments import Moments
from sae_core.sae_base import SparseAutoencoder

MAX_GRADIENT_NORM = 1.0

DECODER_LR_SCALE = 2.0
"""The decoder's learning rate, as a multiple of the others'. What makes features die is the
encoder's, which cannot be as large: docs/recipe.md."""


def adam(sae: SparseAutoencoder, lr: float) -> torch.optim.Adam:
    """Fused Adam on the SAE's parameters.

    It works on them as they lie in memory, which is as the transpose of `W_enc`: it would copy any
    other layout at every step.
    """
    groups = [
        {
            "params": [_as_stored(parameter.detach())],
            "lr_scale": DECODER_LR_SCALE if parameter is sae.W_dec else 1.0,
        }
        for parameter in sae.parameters()
    ]
    return torch.optim.Adam(groups, lr=lr, fused=True)


def hand_over_gradients(sae: SparseAutoencoder, optimizer: torch.optim.Adam) -> list[Tensor]:
    """Give the optimizer the SAE's gradients, which are not copied; gives them as it has them."""
    for stored, parameter in zip(_parameters(optimizer), sae.parameters(), strict=True):
        stored.grad = None if parameter.grad is None else _as_stored(parameter.grad)
    return [stored.grad for stored in _parameters(optimizer) if stored.grad is not None]


def clip_gradients(optimizer: torch.optim.Adam) -> float:
    """Bound the length of all gradients together; gives what it was."""
    tensors = _parameters(optimizer)
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    if norm > MAX_GRADIENT_NORM:
        torch.nn.utils.clip_grads_with_norm_(tensors, MAX_GRADIENT_NORM, norm)
    return float(norm)


def stored_moments(
    optimizer: torch.optim.Adam,
) -> tuple[list[Tensor], list[Moments], list[Tensor]]:
    """The parameters as they lie in memory, Adam's moments, and the () counts of its steps.

    They are the optimizer's own tensors, made if it has taken no step yet.
    """
    parameters = _parameters(optimizer)
    for parameter in parameters:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    states = [optimizer.state[parameter] for parameter in parameters]
    moments = [Moments(state["exp_avg"], state["exp_avg_sq"]) for state in states]
    return parameters, moments, [state["step"] for state in states]


def set_learning_rate(optimizer: torch.optim.Adam, lr: float) -> None:
    """Set the learning rate of the next step."""
    for params in optimizer.param_groups:
        params["lr"] = params["lr_scale"] * lr


def _parameters(optimizer: torch.optim.Adam) -> list[Tensor]:
    return [tensor for params in optimizer.param_groups for tensor in params["params"]]


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.T
