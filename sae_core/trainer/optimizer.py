"""The optimizer of an SAE: Adam, or `active_adam`. The decoder has a larger learning rate, and
gradients are of bounded length.

Of a parameter w, with gradient g in step t, momentum m and second moment v (Kingma, Ba, arXiv
1412.6980):

    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    w <- w - lr m / (1 - b1^t) / ((v / (1 - b2^t))^1/2 + eps)

By `active_adam` a feature moves only in the steps in which it has a gradient, because it is active
on some token: otherwise its encoder row, decoder row and bias stay where they are, while their
moments decay as ever. Adam would move a rare feature for some ten steps after its last gradient, by
several times the learning rate, since its second moment is small. Row w of the decoder has no v:

    w <- w - lr m / |m|

then unit norm, as after every step. This is normalised gradient descent (Hazan et al., arXiv
1507.02030) with momentum (Cutkosky, Mehta, arXiv 2002.03305), for each row: all rows that move turn
by about the same angle, those of features with small gradients too. Muon (Liu et al., arXiv
2502.16982) gives all singular values of a step the same size in a like manner.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sae_core.sae.static.moments import LEAST_LENGTH, PLAIN, Moments, Rule
from sae_core.sae_base import SparseAutoencoder

MAX_GRADIENT_NORM = 1.0


class Adam(torch.optim.Adam):
    """Fused Adam, or `active_adam`, by a rule.

    Args:
        groups: of one parameter each; `of_features` says whether its rows are features.
        b_enc: (F,) whose gradient is zero for a feature without one.
        W_dec: (F, D)
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, rule: Rule, b_enc: Tensor, W_dec: Tensor
    ) -> None:
        super().__init__(groups, lr=lr, betas=(rule.beta1, rule.beta2), fused=True)
        self.rule, self._b_enc, self._W_dec = rule, b_enc, W_dec

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here has a closure
        """One step by the rule."""
        if self.rule.only_active:
            self._step_of_active()
        else:
            super().step()

    def _step_of_active(self) -> None:
        assert self._b_enc.grad is not None
        still = (self._b_enc.grad == 0).nonzero().squeeze(1)
        groups = [group for group in self.param_groups if group["of_features"]]
        rows = [p for group in groups for p in group["params"] if p is not self._W_dec]
        kept = [parameter[still] for parameter in rows]
        gradient, self._W_dec.grad = self._W_dec.grad, None  # Adam passes over it
        super().step()
        self._W_dec.grad = gradient
        for parameter, before in zip(rows, kept, strict=True):
            parameter.index_copy_(0, still, before)
        self._step_of_decoder(still)

    def _step_of_decoder(self, still: Tensor) -> None:
        """A normalised step of all rows but those in `still`."""
        assert self._W_dec.grad is not None
        state = self.state_of(self._W_dec)
        momentum: Tensor = state["exp_avg"].lerp_(self._W_dec.grad, 1 - self.rule.beta1)
        state["step"] += 1
        (lr,) = (g["lr"] for g in self.param_groups if g["params"][0] is self._W_dec)
        share = lr / momentum.norm(dim=1, keepdim=True).clamp_(min=LEAST_LENGTH)
        self._W_dec.addcmul_(momentum, share.index_fill_(0, still, 0.0), value=-1)

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """The count of its steps, (), and its moments, which are the optimizer's own tensors: made
        if it has taken no step yet."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            if not (self.rule.only_active and parameter is self._W_dec):
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def adam(sae: SparseAutoencoder, lr: float, rule: Rule = PLAIN, travel: float = math.inf) -> Adam:
    """The optimizer of the SAE's parameters.

    It works on them as they lie in memory, which is as the transpose of `W_enc`: it would copy any
    other layout at every step.

    Args:
        travel: the sum of the learning rates of all steps.
    """
    stored = {name: _as_stored(tensor.detach()) for name, tensor in sae.named_parameters()}
    scales = sae.lr_scales(travel) | {"W_dec": rule.decoder_lr_scale}
    groups = [
        {
            "params": [tensor],
            "lr_scale": scales.get(name, 1.0),
            "of_features": name != "b_dec",
        }
        for name, tensor in stored.items()
    ]
    return Adam(groups, lr, rule, stored["b_enc"], stored["W_dec"])


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


def stored_moments(optimizer: Adam) -> tuple[list[Tensor], list[Moments], list[Tensor]]:
    """The parameters as they lie in memory, their moments, and the () counts of their steps: the
    optimizer's own tensors."""
    parameters = _parameters(optimizer)
    states = [optimizer.state_of(parameter) for parameter in parameters]
    moments = [Moments(state["exp_avg"], state.get("exp_avg_sq")) for state in states]
    return parameters, moments, [state["step"] for state in states]


def set_learning_rate(optimizer: torch.optim.Adam, lr: float) -> None:
    """Set the learning rate of the next step."""
    for params in optimizer.param_groups:
        params["lr"] = params["lr_scale"] * lr


def _parameters(optimizer: torch.optim.Adam) -> list[Tensor]:
    return [tensor for params in optimizer.param_groups for tensor in params["params"]]


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.T
