"""What an SAE is worth on held-out activations, as it is used after the training."""

from collections.abc import Generator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.sae.losses import Terms
from sae_core.sae.reconstruction import AuxiliaryLoss, Compute, Reconstruction
from sae_core.sae.sparse_ops import LowerBound
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.batches import Batch, Batches, not_finite
from sae_core.trainer.objective import Objective
from sae_core.trainer.step_memory import StepMemory
from sae_core.trainer.training_state import Means, Progress


class Validation(NamedTuple):
    """What a validation found."""

    figures: dict[str, float]
    """By their names in the history, without `val_`."""
    threshold: Tensor | None
    """The calibrated one."""
    aux_bound: LowerBound


class Validator:
    """Measures an SAE on the validation batches."""

    def __init__(self, batches: Batches, objective: Objective, memory: StepMemory) -> None:
        self.batches, self.objective, self.memory = batches, objective, memory
        self.n_stops = 0
        """How often the validation that is under way has stopped."""

    @torch.no_grad()
    def measure(
        self, sae: SparseAutoencoder, progress: Progress, last_batch: Tensor | None
    ) -> Generator[None, None, Validation]:
        """Calibrate the inference threshold on held-out activations, and measure the SAE as it is
        used afterwards. Changes neither SAE nor progress. Stops before each batch.

        Args:
            last_batch: (N, D) of the training, to calibrate on where nothing is held out.

        Raises:
            SAEError: no step of the epoch was finite.
        """
        sae, aux_bound = sae.with_own_threshold(), replace(progress.aux_bound)
        if not (progress.means and progress.means.tokens):
            raise not_finite(sae.spec, "loss", progress.skipped_in_a_row)
        how = self.memory.compute.products(sae.b_dec)
        if self.batches.source.n_validation == 0:
            assert last_batch is not None
            sae.calibrate([last_batch], how)
            return Validation({}, sae.threshold, aux_bound)
        sae.calibrate(self.batches.calibration(), how)
        self.n_stops += 1
        yield
        means, skipped = Means(), 0
        for batch in self.batches.validation(progress.in_phase):
            if not batch.finite:
                skipped += 1
            elif len(batch.x):
                terms, l0 = self._measured(sae, batch, progress, aux_bound)
                by_name = terms.by_name()
                if torch.stack(list(by_name.values())).isfinite().all():
                    means.add(by_name, l0, len(batch.x))
                else:
                    skipped += 1
            self.n_stops += 1
            yield
        figures = means.values()
        if figures:
            figures["loss"] -= sae.spec.aux_penalty * figures["aux_loss"]
        return Validation(figures | {"skipped_batches": skipped}, sae.threshold, aux_bound)

    def _measured(
        self, sae: SparseAutoencoder, batch: Batch, progress: Progress, aux_bound: LowerBound
    ) -> tuple[Terms, float]:
        """The terms and L0 of a validation batch."""
        part = batch.part()

        def measure(compute: Compute) -> tuple[Terms, Reconstruction, AuxiliaryLoss]:
            compute = compute._replace(aux_lower_bound=aux_bound.value, n_tokens=len(batch.x))
            made = sae.reconstruct_at_inference(part.x, part.target, compute)
            aux = self.objective.auxiliary_loss(sae, part, made, compute)
            terms, made = self.objective.over_processes(
                self.objective.terms(part, made, aux), made, len(part.x) / len(batch.x)
            )
            return terms, made, aux

        terms, made, aux = self.memory.run(measure, progress)
        aux_bound.update(aux.least)
        return terms, made.l0
