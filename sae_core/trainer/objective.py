"""What a step minimises: the terms of a batch's loss, of one process or of all."""

import torch
from torch import Tensor

from sae_core.distributed.process_group import ProcessGroup
from sae_core.sae import losses
from sae_core.sae.config import SAESpec
from sae_core.sae.losses import Terms
from sae_core.sae.reconstruction import AuxiliaryLoss, Compute, Reconstruction
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.batches import Batch, Batches
from sae_core.trainer.end_to_end import EndToEnd

AUXILIARY_STRIDE = 4
"""The auxiliary loss looks at one in so many tokens: dead features learn from what all lack."""


class Objective:
    """The loss of an SAE that `spec` describes.

    Args:
        recon_weight: of the reconstruction error.
        batches: know how the activations were scaled.
        end_to_end: adds the terms of its phase; None trains without one.
        group: the processes that share a batch.
    """

    def __init__(
        self,
        spec: SAESpec,
        recon_weight: float,
        batches: Batches,
        end_to_end: EndToEnd | None,
        group: ProcessGroup,
    ) -> None:
        self.spec, self.recon_weight, self.batches = spec, recon_weight, batches
        self.end_to_end, self.group = end_to_end, group

    def auxiliary_loss(
        self, sae: SparseAutoencoder, part: Batch, made: Reconstruction, compute: Compute
    ) -> AuxiliaryLoss:
        """On one in `AUXILIARY_STRIDE` of the whole batch's tokens."""
        some = slice(-(part.shard.start or 0) % AUXILIARY_STRIDE, None, AUXILIARY_STRIDE)
        of_all = -(-compute.total(part.x) // AUXILIARY_STRIDE)
        return sae.auxiliary_loss(
            part.x[some], made.x_hat[some], part.wanted[some], compute._replace(n_tokens=of_all)
        )

    def terms(self, part: Batch, made: Reconstruction, aux: AuxiliaryLoss) -> Terms:
        """Of a process's own tokens."""
        spec, recon = self.spec, losses.reconstruction_loss(part.wanted, made.x_hat)
        recon_part = self.recon_weight * recon
        l1_part = spec.l1_coefficient * made.l1
        loss = recon_part + l1_part + spec.aux_penalty * aux.loss + made.kind_loss
        figures: dict[str, Tensor] = {}
        if self.end_to_end is not None and part.passes is not None:
            x_hat = self.batches.normalise.raw(part.of_spliced(made.x_hat))
            added, figures = self.end_to_end.loss(part.passes, x_hat, len(part.x))
            loss = loss + added
        return Terms(loss, recon, made.l1, recon_part, l1_part, aux.loss, made.kind_loss, figures)

    def balance(self, batch: Batch, part: Batch, made: Reconstruction) -> None:
        """Weigh the terms of the phase by its first batch, of which `part` is this process's: by
        the length of the gradient of its squared error."""
        assert batch.passes is not None
        length = self.group.all_reduce((made.x_hat - part.wanted).pow(2).sum()).sqrt()
        pull = 2 * length / (len(batch.x) * self.batches.normalise.output.scale)
        x_hat = self.batches.normalise.raw(part.of_spliced(made.x_hat))
        self.batches.phase.balance(batch.passes, x_hat, float(pull), len(part.x))

    def over_processes(
        self, terms: Terms, made: Reconstruction, share: float
    ) -> tuple[Terms, Reconstruction]:
        """The terms and figures of the whole batch, from those of this process's share of it."""
        group = self.group
        if group.is_single:
            return terms.mapped(Tensor.detach), made
        l0 = terms.loss.new_tensor(made.l0)
        own = torch.stack([*(term.detach() for term in terms.by_name().values()), l0])
        *summed, l0 = group.all_reduce(share * own).unbind()
        in_order = iter(summed)
        fired = group.all_reduce(made.fired.int()) > 0
        return terms.mapped(lambda _: next(in_order)), made._replace(l0=float(l0), fired=fired)
