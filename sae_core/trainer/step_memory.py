"""How much of a batch a step computes at once, and what it guesses of the batch."""

from collections.abc import Callable

from torch import Tensor

from sae_core.sae.largest_entries import block_rows, tile_rows
from sae_core.sae.reconstruction import Compute
from sae_core.trainer.training_state import Progress
from sae_core.utils.memory import Microbatch, Result

ADVICE = "use fewer --tokens-per-step, a smaller --sae-expansion or another --device"
"""When there is no memory for a step."""


class StepMemory:
    """Takes fewer rows of the encoder product at once when memory runs out, down to one tile. No
    number of rows changes what else a step needs: the pairs of a sparse code, or a dense one.

    Args:
        compute: how a step is computed; its `row_block` is where it begins.
        tokens_per_step: rows of a whole batch.
        weights: of the encoder, (D, F).
    """

    def __init__(self, compute: Compute, tokens_per_step: int, weights: Tensor) -> None:
        of_rows = weights.shape[1], weights.dtype, weights.device
        self.compute = compute
        self.usual = min(block_rows(*of_rows, compute.row_block), tokens_per_step)
        self.microbatch = Microbatch(
            self.usual, "rows of the encoder product", ADVICE, tile_rows(*of_rows)
        )

    def run(self, work: Callable[[Compute], Result], progress: Progress) -> Result:
        """`work`, with the bounds that the training has found so far. Several processes cannot try
        again: the others would wait for the collective calls of the first attempt."""

        def with_rows(rows: int) -> Result:
            # A smaller block than was asked for only once memory has run out.
            block = self.compute.row_block if rows >= self.usual else rows
            return work(
                self.compute._replace(
                    row_block=block,
                    lower_bound=progress.bound.value,
                    aux_lower_bound=progress.aux_bound.value,
                )
            )

        if self.compute.group.is_single:
            return self.microbatch.retry(with_rows)
        return with_rows(self.microbatch.size)
