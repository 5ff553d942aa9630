"""BatchTopK SAEs that are trained at several k at once: the Multi-TopK of Gao et al. ("Scaling and
evaluating sparse autoencoders", arXiv 2406.04093, section 5.3) with a batch top-k.

For each m of `MULTIPLES`, the N*m*k largest pre-activations of a batch of N tokens have to
reconstruct. With L_m the squared error of that reconstruction,

    loss = L_1 + the mean of L_m over the other m

L_1 is the reconstruction loss, and the mean is the `kind_loss`. Inference has one threshold: that
of k. The paper adds L_4 / 8 to L_1, so that one SAE serves at several k. Half and twice k also
lower the error at k itself (docs/recipe.md).

Each code contains the smaller ones. So the reconstructions are cumulative sums of what disjoint
sets of pairs decode to, and all of them cost one decode of the largest code.
"""

import torch
from torch import Tensor

from sae_core.sae import losses
from sae_core.sae.config import MULTIPLES
from sae_core.sae.kinds.batch_topk import BatchTopKSAE
from sae_core.sae.largest_entries import largest_of_all
from sae_core.sae.nested import nested_reconstructions
from sae_core.sae.reconstruction import PLAIN, Compute, Reconstruction


class MultiBatchTopKSAE(BatchTopKSAE):
    """Batch top-k at several k while training; at inference a BatchTopK SAE."""

    def reconstruct(
        self, x: Tensor, target: Tensor | None = None, compute: Compute = PLAIN
    ) -> Reconstruction:
        totals = [round(m * compute.total(x) * self.spec.top_k) for m in MULTIPLES]
        code = self.training_code(x, totals[-1], compute)
        value = code.value.detach()
        kept = torch.zeros(len(totals) - 1, len(value), dtype=torch.bool, device=value.device)
        for mask, total in zip(kept, totals, strict=False):
            mask[largest_of_all(value, total, compute.group)[0]] = True
        group = len(kept) - kept.sum(0)  # the smallest code that a pair belongs to
        parts = nested_reconstructions(code, group, len(totals), self.weights, compute.products(x))
        main = MULTIPLES.index(1.0)
        wanted = x if target is None else target
        errors = [losses.reconstruction_loss(wanted, x_hat) for x_hat in parts]
        others = torch.stack(errors[:main] + errors[main + 1 :]).mean()
        own = code.where(kept[main])
        return Reconstruction.of_code(own, parts[main], others)._replace(least=code.least)
