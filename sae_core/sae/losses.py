"""The terms of the loss, each a scalar tensor. Shapes: N tokens, D activation width."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae.static.backend import has_kernels

LOGIT_ROWS = 256
"""Tokens whose logits, V each, are in memory at once."""

CACHED_LOGITS = 2**18
"""Logits that a CPU's thread works on at once: in float32 they stay in a core's cache."""

KERNEL_ROWS = 2048
"""The same where `kl_kernel` runs, which needs a third of the memory: products this large have a
GPU's full speed."""


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

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Terms":
        """The function's results for each term."""
        terms = self._asdict()
        phase = terms.pop("end_to_end")
        results = {name: function(term) for name, term in terms.items()}
        return Terms(**results, end_to_end={name: function(term) for name, term in phase.items()})


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Mean over tokens of the squared error `||x - x_hat||^2`, both (N, D).

    The trainer scales activations to `E||x||^2 = 1`, so this is close to the fraction of
    variance unexplained.
    """
    return F.mse_loss(x_hat, x, reduction="sum") / len(x)


def l1_loss(values: Tensor, n_tokens: int) -> Tensor:
    """Mean over tokens of the code's L1 norm; `values` are its non-negative entries.

    Decoder rows have unit norm, so no feature can shrink its code by growing its row.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.sum(dtype=dtype) / max(n_tokens, 1)


def normalised_residual_loss(
    residual: Tensor,
    prediction: Tensor,
    n_tokens: int | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Squared error of `prediction` over the residual's own variance, both (N, D).

    The auxiliary loss of Gao et al. (arXiv 2406.04093, section A.2): 1 when dead features explain
    nothing of what the live ones left over; 0 when nothing is left over. It is over
    the `n_tokens` tokens of all processes, by default those given.
    """
    residual = residual.detach()
    n = len(residual)
    mean = group.mean(residual.mean(0), n, n_tokens or n).expand_as(residual)
    variance = group.all_reduce(F.mse_loss(mean, residual, reduction="sum"))
    error = group.all_reduce(F.mse_loss(prediction, residual, reduction="sum"))
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


class KnownGradient(Function):
    """`KnownGradient.apply(x, value, gradient)`: the scalar `value`, when what its backward pass
    would give `x` has been computed together with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g * ctx.saved_tensors[0], None, None


def kl_of_logits(
    clean: Tensor, spliced: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(n,) `KL(softmax(clean) || softmax(spliced))` of logits (n, V), and its gradient (n, V) with
    respect to `spliced`, in its number format. `clean` may be overwritten."""
    dtype = torch.promote_types(spliced.dtype, torch.float32)
    log_p = F.log_softmax(clean, dim=-1, dtype=dtype)
    del clean  # its memory is free for what follows
    log_q = F.log_softmax(spliced, dim=-1, dtype=dtype)
    p = log_p.exp()
    kl = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return kl, log_q.exp_().sub_(p).to(spliced.dtype) if with_gradient else None


def in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of tensors, the first of which has logits (n, V): on a CPU so few tokens at a time
    that its memory does not hold up what is done with them, elsewhere all at once."""
    logits, n_rows = tensors[0], len(tensors[0])
    if logits.device.type == "cpu":
        n_rows = max(1, CACHED_LOGITS // logits.shape[1]) * torch.get_num_threads()
    return zip(*(tensor.split(n_rows) for tensor in tensors), strict=True)


def kl_in_cache(
    clean: Tensor, spliced: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`kl_of_logits`, a few tokens at a time."""
    results = [kl_of_logits(p, q, with_gradient) for p, q in in_cache(clean, spliced)]
    kl = torch.cat([part for part, _ in results])
    gradients = [gradient for _, gradient in results if gradient is not None]
    return kl, torch.cat(gradients) if with_gradient else None


def _kl_on(device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Any], int]:
    """What computes the KL of logits there, and of how many tokens at a time."""
    if has_kernels(device) and dtype != torch.float64:
        from sae_core.sae import kl_kernel

        return kl_kernel.kl_of_logits, KERNEL_ROWS
    return kl_in_cache if device.type == "cpu" else kl_of_logits, LOGIT_ROWS


def unembedded_kl(unembed: Callable[[Tensor], Tensor], clean: Tensor, spliced: Tensor) -> Tensor:
    """`sum KL(p_clean || p_spliced)` over tokens, in nats, from final hidden states (N, D).

    From the clean to the spliced model: `sum_v p_clean[v] (log p_clean[v] - log p_spliced[v])`.
    `unembed` makes (n, V) logits of n hidden states. Value and gradient, which goes to `spliced`
    alone, are computed together, some tokens at a time: the N x V logits never exist.
    """
    wanted = spliced.requires_grad and torch.is_grad_enabled()
    dtype = torch.promote_types(spliced.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=spliced.device)
    gradient = torch.empty_like(spliced) if wanted else None
    kl_of, n_rows = _kl_on(spliced.device, spliced.dtype)
    for first in range(0, len(spliced), n_rows):
        block = slice(first, first + n_rows)
        rows = spliced[block].detach().requires_grad_(wanted)
        logits = unembed(rows)
        with torch.no_grad():
            kl, d_logits = kl_of(unembed(clean[block]), logits, wanted)
        total += kl.sum()
        if gradient is not None:
            [gradient[block]] = torch.autograd.grad(logits, rows, d_logits)
    return total if gradient is None else KnownGradient.apply(spliced, total, gradient)
