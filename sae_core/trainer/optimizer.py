"""Adam for an SAE: the decoder has a larger learning rate, and gradients are of bounded length."""

from typing import Any

import torch
from torch import Tensor

from sae_core.sae.static.moments import PLAIN, Moments, Rule
from sae_core.sae_base import SparseAutoencoder

MAX_GRADIENT_NORM = 1.0

DECODER_LR_SCALE = 2.0
"""The decoder's learning rate, as a multiple of the others'. What makes features die is the
encoder's, which cannot be as large: docs/recipe.md."""


class Adam(torch.optim.Adam):
    """Fused Adam, by a rule.

    Args:
        groups: of one parameter each; `of_features` says whether its rows are features.
        b_enc: whose gradient is zero for a feature without one.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, rule: Rule, b_enc: Tensor) -> None:
        super().__init__(groups, lr=lr, betas=(rule.beta1, rule.beta2), fused=True)
        self.rule, self._b_enc = rule, b_enc

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here has a closure
        """One step; features without a gradient stay where they are if the rule says so."""
        if not self.rule.only_active or self._b_enc.grad is None:
            super().step()
            return
        still = (self._b_enc.grad == 0).nonzero().squeeze(1)
        rows = [p for group in self.param_groups if group["of_features"] for p in group["params"]]
        kept = [parameter[still] for parameter in rows]
        super().step()
        for parameter, before in zip(rows, kept, strict=True):
            parameter.index_copy_(0, still, before)


def adam(sae: SparseAutoencoder, lr: float, rule: Rule = PLAIN) -> Adam:
    """Fused Adam on the SAE's parameters.

    It works on them as they lie in memory, which is as the transpose of `W_enc`: it would copy any
    other layout at every step.
    """
    stored = {name: _as_stored(tensor.detach()) for name, tensor in sae.named_parameters()}
    groups = [
        {
            "params": [tensor],
            "lr_scale": DECODER_LR_SCALE if name == "W_dec" else 1.0,
            "of_features": name != "b_dec",
        }
        for name, tensor in stored.items()
    ]
    return Adam(groups, lr, rule, stored["b_enc"])


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
