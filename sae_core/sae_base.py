"""The sparse autoencoder: what all kinds share. Shapes: N tokens, D = d_in, F = d_sae.

A kind says how a training batch is encoded, decoded and penalised (`reconstruct`), and which
pre-activations count at inference (`encode`, by default those above the threshold). While
training, activations are centred and scaled; `folded` moves both into the weights, and only
folded SAEs are stored.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_core.sae import losses, sparse_ops
from sae_core.sae.config import SAESpec
from sae_core.sae.dense_start import ENCODER_SCALE
from sae_core.sae.largest_entries import block_rows
from sae_core.sae.normalisation import beyond
from sae_core.sae.precision import Precision
from sae_core.sae.reconstruction import PLAIN, AuxiliaryLoss, Compute, Reconstruction
from sae_core.utils.errors import SAEError

ROW_BLOCK = 1024
"""Decoder rows that are projected at once on a CPU: they stay in the cache."""


def _splice() -> ModuleType:
    """A room below this one, found when it is asked for: no training depends on it."""
    return import_module("sae_core.steering.splice")


def as_rows(activations: Tensor | Iterable[Tensor], like: Tensor) -> Tensor:
    """(N, D) all of the activations (..., D), in the format and on the device of `like`."""
    if not isinstance(activations, Tensor):
        activations = torch.cat(list(activations))
    return activations.flatten(0, -2).to(like.device, like.dtype)


class SparseAutoencoder(nn.Module, ABC):
    """`x_hat = encode(x) @ W_dec + b_dec`, with rows of `W_dec` of unit norm.

    An SAE encodes `x - b_dec`. A transcoder (Dunefsky, Chlenski, Nanda: "Transcoders Find
    Interpretable LLM Feature Circuits", arXiv 2406.11944) is one whose `x_hat` is to be another
    activation than x: its target. `b_dec` belongs to the target, and it encodes x as it is.
    """

    ever_fired: Tensor
    num_batches_not_active: Tensor
    threshold: Tensor | None
    """None while it is not known: the trainer before this one stored none with its BatchTopK
    SAEs."""

    keeps_outliers: bool = True
    """Whether `forward`, a splice and steering leave outliers (`is_outlier`) as they are. No SAE is
    trained on them, and what it makes of one ruins the model's predictions. False makes the SAE
    treat them like all other activations, as SAELens does."""

    encoder_scale: ClassVar[float] = ENCODER_SCALE
    """Length of the encoder's directions at the start; the decoder's have length 1."""

    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    """What `folded` scales: the tensors that are added to or compared with pre-activations."""

    def __init__(self, spec: SAESpec) -> None:
        super().__init__()
        self.spec = spec
        d_in, d_sae = spec.d_in, spec.d_sae
        # (D, F) as every SAE library has it, but laid out so that a feature is contiguous.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("ever_fired", torch.zeros(d_sae, dtype=torch.bool))
        self.register_buffer("num_batches_not_active", torch.zeros(d_sae, dtype=torch.long))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit decoder rows, and the encoder tied to them at the start but for its scale.

        With Adam, whose steps have one size, a shorter encoder turns faster.
        """
        rows = torch.randn(self.spec.d_sae, self.spec.d_in, generator=generator)
        self.W_dec.copy_(F.normalize(rows, dim=1))
        self.W_enc.copy_(self.encoder_scale * self.W_dec.T)

    @property
    def weights(self) -> sparse_ops.Weights:
        return sparse_ops.Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    @property
    def input_bias(self) -> Tensor:
        """(D,) what is subtracted from x before it is encoded."""
        return torch.zeros_like(self.b_dec) if self.spec.target_hook_name else self.b_dec

    @property
    def encoder(self) -> sparse_ops.Weights:
        """The weights as functions that encode take them."""
        return self.weights._replace(b_dec=self.input_bias)

    # Inference

    @property
    def known_threshold(self) -> Tensor:
        """The threshold.

        Raises:
            SAEError: there is none.
        """
        if self.threshold is None:
            raise SAEError(
                f"the {self.spec.sae_type} SAE at {self.spec.site} was stored without a threshold, "
                "and needs one: give it with load_pretrained(..., threshold=...), or find it with "
                "sae.calibrate(activations)"
            )
        return self.threshold

    def set_threshold(self, threshold: float) -> None:
        """Set the inference threshold of a kind that has one for all features.

        Raises:
            SAEError: the kind has none, or the number cannot be one.
        """
        raise SAEError(f"threshold {threshold}: a {self.spec.sae_type} SAE has none to set")

    def pre_activations(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F): `(x - b_dec) @ W_enc + b_enc`; a transcoder's without `b_dec`."""
        return (x.to(self.W_enc.dtype) - self.input_bias) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., F) features: `relu(pre)` where `pre` exceeds the threshold.

        A token's features depend on that token alone.
        """
        pre = self.pre_activations(x)
        return torch.relu(pre) * (pre > self.known_threshold)

    def encode_sparse(self, x: Tensor, precision: Precision | None = None) -> sparse_ops.SparseCode:
        """(N, D) -> the features of `encode` as pairs, if possible without the dense code."""
        x = x.to(self.W_enc.dtype)
        return sparse_ops.above(x, self.encoder, self.known_threshold, precision)

    def _encode_densely(self, x: Tensor) -> sparse_ops.SparseCode:
        """`encode_sparse` for kinds with an `encode` of their own: few tokens at once."""
        rows = block_rows(self.spec.d_sae, self.W_enc.dtype, x.device)
        return sparse_ops.sparse(self.encode(block) for block in x.split(rows))

    def decode(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., D)."""
        return features @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) what takes the place of x at inference: the reconstruction, and with
        `keeps_outliers` an outlier itself. A transcoder's outliers are reconstructed too: what
        would be kept is at its target, and not in x."""
        x_hat = self.decode(self.encode(x))
        if self.spec.target_hook_name or not self.keeps_outliers:
            return x_hat
        return torch.where(self.is_outlier(x)[..., None], x.to(x_hat.dtype), x_hat)

    def is_outlier(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """(..., D) raw activations -> (...) bool: those on which no SAE is trained, attention sinks
        above all. They are longer than the norm that the training recorded, ten times the median
        (`spec.outlier_norms`); none is where it recorded none. `encode` gives an outlier features
        by the same formula as all activations, and they mean nothing.

        Args:
            target: (..., D) of a transcoder: an activation is an outlier if that at its target is.
        """
        at_hook, at_target = self.spec.outlier_norms
        found = beyond(x, at_hook)
        return found if target is None else found | beyond(target, at_target)

    # Inside a language model

    def spliced_into(
        self,
        model: Any,
        replace: Callable[[Tensor], Tensor] | None = None,
        keep_error: bool = False,
        tokenizer: Any = None,
    ) -> AbstractContextManager[Any]:
        """`steering.splice.spliced`: while it is open, the model has the reconstruction."""
        return _splice().spliced(self, model, replace, keep_error, tokenizer)

    def steer(
        self, model: Any, strengths: Mapping[int, float], tokenizer: Any = None
    ) -> AbstractContextManager[None]:
        """`steering.splice.steered`: while it is open, features are added, each by its strength."""
        return _splice().steered(self, model, strengths, tokenizer)

    # Training

    @abstractmethod
    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        """Encode and decode a training batch (N, D), with gradients to the weights.

        Args:
            target: (N, D) of a transcoder, what `x_hat` is to be; x itself by default.
        """

    @torch.no_grad()
    def reconstruct_at_inference(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        """The same for the code of `encode`, for validation; most kinds train with that code."""
        return self.reconstruct(x, target, compute)

    def calibrate(
        self, activations: Tensor | Iterable[Tensor], precision: Precision | None = None
    ) -> None:
        """Set the inference threshold from held-out activations (..., D), in one tensor or
        several, where the kind needs one.

        Args:
            precision: its product only finds the pairs; their values are in the weights' format.
        """

    def lr_scales(self, travel: float) -> dict[str, float]:
        """Learning rates of parameters, as multiples of the encoder's: 1 of those that are not
        here. The decoder's is the optimizer's.

        Args:
            travel: the sum of the learning rates of all steps, which is about how far Adam can move
                a number.
        """
        return {}

    def auxiliary_loss(
        self,
        x: Tensor,
        x_hat: Tensor,
        target: Tensor | None = None,
        compute: Compute = PLAIN,
    ) -> AuxiliaryLoss:
        """How badly the dead features explain what the live ones left over.

        The `top_k_aux` largest dead pre-activations per token, by one threshold for the batch,
        reconstruct the residual (arXiv 2406.04093, section A.2).
        """
        dead = self.dead_features.nonzero().squeeze(1)
        if dead.numel() == 0:
            return AuxiliaryLoss(x.new_zeros(()))
        residual = (x if target is None else target) - x_hat
        needs_gradient = torch.is_grad_enabled()
        W_enc_FD, b_enc, W_dec = copies = tuple(
            rows.detach()[dead].requires_grad_(needs_gradient)
            for rows in (self.W_enc.T, self.b_enc, self.W_dec)
        )
        weights = sparse_ops.Weights(W_enc_FD.T, b_enc, W_dec, self.input_bias.detach())
        code = sparse_ops.encode(
            x,
            weights,
            compute.total(x) * min(self.spec.top_k_aux, dead.numel()),
            lower_bound=compute.aux_lower_bound,
            precision=compute.precision,
            products=compute.products(x),
            group=compute.group,
        )
        prediction = sparse_ops.decode(code, weights, compute.products(x)) - weights.b_dec
        loss = losses.normalised_residual_loss(
            residual, prediction, compute.total(x), compute.group
        )
        return AuxiliaryLoss(loss, code.least, dead, copies)

    @property
    def dead_features(self) -> Tensor:
        """(F,) bool: silent for more than `n_batches_to_dead` batches."""
        return self.num_batches_not_active > self.spec.n_batches_to_dead

    @torch.no_grad()
    def record_activity(self, fired: Tensor) -> None:
        """Count one more batch in which the features `fired` (F,) bool were active."""
        self.ever_fired |= fired
        self.num_batches_not_active += 1
        self.num_batches_not_active[fired] = 0

    def with_own_threshold(self) -> "SparseAutoencoder":
        """This SAE with a copy of its threshold; all other tensors are shared."""
        tensors = [*self.parameters(), *self.buffers()]
        shared = [self.spec, *(tensor for tensor in tensors if tensor is not self.threshold)]
        return copy.deepcopy(self, {id(it): it for it in shared})

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from each decoder row's gradient the part along the row, which the unit norm
        would undo."""
        assert self.W_dec.grad is not None
        rows = ROW_BLOCK if self.W_dec.device.type == "cpu" else len(self.W_dec)
        blocks = zip(self.W_dec.grad.split(rows), self.W_dec.split(rows), strict=True)
        for gradient, rows in blocks:
            along = (gradient * rows).sum(1, keepdim=True)
            gradient.addcmul_(along, rows, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring the decoder rows back to unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_(min=1e-12))

    # Storing

    @torch.no_grad()
    def folded(
        self,
        mean: Tensor,
        scale: float,
        dtype: torch.dtype,
        target: tuple[Tensor, float] | None = None,
    ) -> "SparseAutoencoder":
        """A copy on the CPU that takes raw activations, when this one takes `(x - mean) / scale`.

        `b_dec = mean + scale b_dec'`, `b_enc = scale b_enc'`, `threshold = scale threshold'`:
        the same reconstruction from features `scale` times as large.

        A transcoder gives `(y - m) / s` for the `target` (m, s), and (m, s) take the place of mean
        and scale there. What is left of x's own goes into the encoder:
        `W_enc = s / scale W_enc'`, `b_enc = s b_enc' - mean @ W_enc`.
        """
        # Copied straight to the CPU: a second SAE need not fit on the GPU.
        there: dict[int, Any] = {id(t): t.to("cpu", copy=True) for t in self.buffers()}
        for p in self.parameters():
            there[id(p)] = nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad)
        folded = copy.deepcopy(self, there)
        out_mean, out_scale = target or (mean, scale)
        folded.b_dec.mul_(out_scale).add_(out_mean.cpu())
        for name in self.in_units_of_x:
            getattr(folded, name).mul_(out_scale)
        if target:
            folded.W_enc.mul_(out_scale / scale)
            folded.shift_pre_activations(-(mean.cpu() @ folded.W_enc))
        return folded.to(dtype)

    @torch.no_grad()
    def unfolded(
        self, mean: Tensor, scale: float, target: tuple[Tensor, float] | None = None
    ) -> "SparseAutoencoder":
        """The reverse of `folded`: a float32 copy on the device of `mean` that takes
        `(x - mean) / scale`, when this one takes raw activations."""
        unfolded = copy.deepcopy(self).to(mean.device, torch.float32)
        out_mean, out_scale = target or (mean, scale)
        if target:
            unfolded.shift_pre_activations(mean @ unfolded.W_enc)
            unfolded.W_enc.mul_(scale / out_scale)
        for name in self.in_units_of_x:
            if (tensor := getattr(unfolded, name)) is not None:
                tensor.div_(out_scale)
        unfolded.b_dec.sub_(out_mean).div_(out_scale)
        return unfolded

    def shift_pre_activations(self, shift: Tensor) -> None:
        """Add (F,) to what `x @ W_enc` is taken for."""
        self.b_enc.add_(shift)

    def tensors(self) -> dict[str, Tensor]:
        """The state as contiguous tensors, as `weights.pt` holds it.

        Raises:
            SAEError: its threshold is not known.
        """
        self.known_threshold  # noqa: B018
        return {name: value.detach().contiguous() for name, value in self.state_dict().items()}

    def saelens_config(self) -> dict[str, Any]:
        """The part of SAELens's `cfg.json` that depends on the kind."""
        return {"architecture": "jumprelu"}

    def saelens_tensors(self) -> dict[str, Tensor]:
        """The tensors of SAELens's file, under its names."""
        return self.weights._asdict() | {"threshold": self.known_threshold.expand(self.spec.d_sae)}
