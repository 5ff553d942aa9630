"""One training step of an SAE with a top-k in fixed sizes, during which the host waits for nothing.

What it computes is the step of `training.py`. With N rows of raw activations:

    kept = norm <= max_norm,  n = |kept|                    outliers are masked, not dropped
    x = (raw - mean) / scale,  pre = (x - b_dec) @ W_enc + b_enc        in bfloat16
    code = the n k largest of relu(pre) on kept rows, or the k largest of each    N k slots
    aux  = the n' k' largest on dead features, on one in 4 of the kept rows: a mask over `pre`
    x_hat = code @ W_dec + b_dec,   e = x_hat - x
    x_hat' = aux @ W_dec,           e' = x_hat' + e         on those rows; -e is the residual
    loss = w |e|^2 / n + c_1 |code|_1 / n + c_aux |e'|^2 / |residual - its mean|^2

    of a kind with nested codes + the mean over m of |x_hat_m - x|^2 / n: x_hat_m of the first m
    features (Matryoshka), or of the n k/2 and of the n 2k largest pairs (Multi-BatchTopK)

so dL/dx_hat = 2 w e / n and dL/dx_hat' = 2 c_aux e' / |residual - its mean|^2. The gradients of the
weights are summed over the pairs of both codes, which are sorted once, as one list; or, if more
than `DENSE_SHARE` of a code is active and values are in bfloat16, as dense products. Projection,
clipping, the optimizer and the unit norm follow, with the learning rate on the device.

A pair reads a row of W_dec to decode and another time for dL/dvalue, and for the gradients one of x
and one of dL/dx_hat. This is most of what a large step reads (docs/benchmarks.md). So with bfloat16
values these rows are in bfloat16; their sums are in float32.

Float32 values are computed separately, for the pairs alone. First, twice as many candidates as are
wanted are found by an upper bound of each entry: `pre` plus the most that rounding to bfloat16 can
have taken from it, `ROUNDING |x| |w|`. If the least value kept exceeds the bounds of all entries
that are no candidates, none was missed; otherwise the step is not taken. The k largest of each of
thousands of tokens cannot be told from the next ones like this: some token is always in doubt. So
with float32 values the product of a TopK SAE is in float32, and its entries are the values.

Nor is it taken if an activation, the loss or the gradient is not finite, or if no row is kept. Then
neither this step nor any later one changes anything until the host looks (`ahead.py`) and takes the
batch with the ordinary code. So the order of events is that of the ordinary loop.

Several processes can share a step. Each has the whole batch, so all know what is kept, and each
goes on with its own rows. They add up the counts of a top-k, the residual's sum for its mean, the
sums for the loss, and the gradients, which makes everything that decides on the step the same in
all of them.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.sae.dense_ops import DENSE_SHARE
from sae_core.sae.largest_entries import ROUNDING
from sae_core.sae.normalisation import Normalisation
from sae_core.sae.precision import Precision
from sae_core.sae.static.backend import Backend
from sae_core.sae.static.facts import FIGURES, Facts, Figures, Weighting
from sae_core.sae.static.nested import nesting_of
from sae_core.sae.static.pairs import Codes, Gradients, Prepared, Slots, entries, refine
from sae_core.sae.static.per_token import largest_of_each
from sae_core.sae_base import SparseAutoencoder
from sae_core.trainer.objective import AUXILIARY_STRIDE
from sae_core.trainer.optimizer import MAX_GRADIENT_NORM, Adam, stored_moments
from sae_core.utils.transfer import to_device

KIND_LOSS = Figures._fields.index("kind_loss")

CANDIDATES = 2
"""Candidates per pair that is wanted, for float32 values."""


class Rows(NamedTuple):
    """This process's rows of a batch as they enter the SAE, and how many of all rows count."""

    made: Prepared
    some: Tensor
    """(N,) bool: the rows of the auxiliary loss."""
    n: Tensor
    """() int32: rows of the batch that are kept."""
    n_some: Tensor
    """() int32"""
    finite: Tensor
    """() bool: all rows are."""


class Choice(NamedTuple):
    """The code of a batch, and that of its dead features."""

    main: Slots
    """With all nested codes."""
    aux: Slots
    aux_total: Tensor
    """() int32: pairs that the auxiliary loss wants; 0 without dead features."""
    sure: Tensor
    """() bool: no entry was missed."""


class Own(NamedTuple):
    """The pairs of the SAE's own code: all of `Choice.main` but those of a larger nested code."""

    column: Tensor
    """(P,) int32; F where there is none."""
    value: Tensor
    """(P,) float32; 0 where there is none."""
    n_pairs: Tensor
    """() int32"""


class StaticStep:
    """The step of one training, on the SAE's and the optimizer's own tensors.

    Args:
        like: a batch of raw activations (N, D), or (N, 2 D) for a transcoder.
        n_steps: most steps between two looks of the host.
        group: the processes that share each batch.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        optimizer: Adam,
        normalise: Normalisation,
        recon_weight: float,
        precision: Precision,
        like: Tensor,
        n_steps: int,
        ops: Backend,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.group, self.own = group, group.shard(len(like))
        self.sae, self.normalise, self.rule = sae, normalise, optimizer.rule
        self.precision, spec = precision, sae.spec
        self.is_exact = precision.value_dtype == torch.float32
        self.is_of_tokens = spec.sae_type == "topk"
        self.nesting = nesting_of(spec, sae.b_dec.device)
        n_codes = self.nesting.n_codes if self.nesting else 1  # each is a dense product of its own
        self.k = round(spec.top_k * (self.nesting.multiple if self.nesting else 1))
        is_dense = self.k > DENSE_SHARE * spec.d_sae * n_codes and not self.is_exact
        self.ops = ops.densely() if is_dense else ops
        self.weighting = Weighting(recon_weight, spec.l1_coefficient, spec.aux_penalty)
        n_rows = self.own.stop - self.own.start if self.is_of_tokens else len(like)
        self.n_pairs = n_rows * self.k  # all of a batch's may be in one process
        n_some, n_dead = -(-len(like) // AUXILIARY_STRIDE), min(spec.top_k_aux, spec.d_sae)
        self.n_aux = n_some * n_dead
        (self.W_enc, self.b_enc, self.W_dec, self.b_dec), self.moments, self.counts = (
            stored_moments(optimizer)
        )
        device = self.b_dec.device
        self.raw = torch.zeros(like.shape, dtype=like.dtype, device=device)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)
        self.at = torch.zeros((), dtype=torch.int64, device=device)
        self.record = torch.zeros(n_steps, FIGURES, device=device)
        self.floors = torch.zeros(2, dtype=torch.int32, device=device)
        self.factors = torch.zeros_like(self.W_enc, dtype=torch.bfloat16)
        self.directions = None if self.is_exact else torch.zeros_like(self.factors)
        """The decoder in bfloat16."""
        self.sure = torch.ones((), dtype=torch.bool, device=device)
        self.all_features = torch.ones(spec.d_sae, dtype=torch.bool, device=device)

    @torch.no_grad()
    def begin(self, halted: bool = False) -> None:
        """Forget what was recorded, and take the weights as they are now.

        Args:
            halted: let the next steps change nothing.
        """
        self.halted.fill_(halted)
        self.at.zero_()
        self.factors.copy_(self.W_enc)
        if self.directions is not None:
            self.directions.copy_(self.W_dec)

    @property
    def decoder(self) -> Tensor:
        """(F, D) what the pairs read."""
        return self.W_dec if self.directions is None else self.directions

    def feed(self, raw: Tensor, lr: float) -> None:
        """Set the batch and the learning rate of the next step, without waiting for the device."""
        self.raw.copy_(to_device(raw, self.raw.device))
        self.lr.fill_(lr)

    def figures(self, n_steps: int) -> list[Figures]:
        """Of the steps since `begin`; waits for them."""
        return [Figures(*row.unbind()) for row in self.record[:n_steps].cpu()]

    @torch.no_grad()
    def run(self) -> None:
        """The step."""
        rows = self._rows()
        choice = self._encode(rows)
        codes, own = self._codes(rows, choice)
        figures, G, by_l1 = self._losses(rows, choice, codes, own)
        gradients, by_x_hat = self._gradients(rows, codes, own, G, by_l1)
        taken = self._update(rows, choice, figures, gradients, by_x_hat)
        self._note_activity(own, taken)

    def _rows(self) -> Rows:
        """Centre and scale the batch, mask its outliers, and count."""
        made = self.ops.prepare(self.raw, self.normalise.sites, self.sae.input_bias)
        number = made.kept.cumsum(0, dtype=torch.int32)
        some = made.kept & ((number - 1) % AUXILIARY_STRIDE == 0)
        numbers = number[-1], some.sum(dtype=torch.int32), made.finite.all()
        return Rows(Prepared(*(each[self.own] for each in made)), some[self.own], *numbers)

    def _encode(self, rows: Rows) -> Choice:
        """The pairs of both codes, from one product."""
        spec, made = self.sae.spec, rows.made
        pre, dead = self._pre_activations(made), self.sae.dead_features
        aux_total = rows.n_some * dead.sum(dtype=torch.int32).clamp(max=spec.top_k_aux)
        if self.is_of_tokens:
            main = largest_of_each(pre, made.kept, spec.top_k, self.n_pairs)
            main_sure = self.sure
        else:
            wanted = rows.n * self.k, self.n_pairs, self.floors[0]
            main, main_sure = self._of_batch(pre, made, made.kept, self.all_features, *wanted)
        wanted = aux_total, self.n_aux, self.floors[1]
        aux, aux_sure = self._of_batch(pre, made, rows.some, dead, *wanted)
        return Choice(main, aux, aux_total, main_sure & aux_sure)

    def _codes(self, rows: Rows, choice: Choice) -> tuple[Codes, Own]:
        """What is decoded, one code for each group of pairs and one of the dead features; and the
        SAE's own pairs, in their order there."""
        main, nesting = choice.main, self.nesting
        own = Own(main.column, main.value, main.n_pairs)
        if nesting is None:
            return Codes.of(main, choice.aux), own
        group = nesting.groups(main, rows.n * self.sae.spec.top_k, self.group)
        codes = Codes.nested(main, group, nesting.n_codes, choice.aux)
        if nesting.main < nesting.n_codes - 1:
            column, value = codes.column[: self.n_pairs], codes.value[: self.n_pairs]
            is_own = codes.row[: self.n_pairs] < (nesting.main + 1) * codes.n_tokens
            is_own = is_own & (value > 0)
            column = torch.where(is_own, column, self.sae.spec.d_sae)
            value = torch.where(is_own, value, 0.0)
            own = Own(column, value, is_own.sum(dtype=torch.int32))
        return codes, own

    def _pre_activations(self, made: Prepared) -> Tensor:
        """(N, F) bfloat16; for float32 values an upper bound of each, or of a TopK SAE float32."""
        bias = self.b_enc
        if self.is_exact and self.is_of_tokens:
            return torch.addmm(bias, made.x, self.W_enc.T)
        if self.is_exact:
            length = torch.where(made.kept, made.x.norm(dim=1), 0.0).amax()
            bias = bias + ROUNDING * length * self.W_enc.norm(dim=1)
            bias = bias + ROUNDING * bias.abs()
        return torch.addmm(bias.bfloat16(), made.half, self.factors.T)

    def _of_batch(
        self,
        pre: Tensor,
        made: Prepared,
        chosen: Tensor,
        features: Tensor,
        total: Tensor,
        n_slots: int,
        floor: Tensor,
    ) -> tuple[Slots, Tensor]:
        """The `total` largest of some rows and features, and whether none can have been missed."""
        if not self.is_exact:
            given = chosen, features, total, n_slots, floor, self.group
            return self.ops.select(pre, *given), self.sure
        many = CANDIDATES * total, CANDIDATES * n_slots
        found = self.ops.select(pre.bfloat16(), chosen, features, *many, floor, self.group)
        value = entries(pre, found) if self.is_of_tokens else self._values(Codes.of(found), made)
        code = refine(found, value, total, n_slots, self.sae.spec.d_sae, self.group)
        most = found.least * (1 + 2**-7)  # that an entry which is no candidate can be
        return code, (total == 0) | (found.least == 0) | (code.least > most)

    def _values(self, codes: Codes, made: Prepared) -> Tensor:
        """(P,) the pairs' values in float32."""
        bias = torch.cat([self.b_enc, self.b_enc.new_zeros(1)])[codes.column.long()]
        return (self.ops.sampled(codes, made.x, self.W_enc) + bias).clamp(min=0.0)

    def _losses(
        self, rows: Rows, choice: Choice, codes: Codes, own: Own
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The figures, (M N, D) the loss's gradient to the reconstructions of all codes, and ()
        what the L1 norm adds to that of each value."""
        made, decoded = rows.made, self.ops.decode(codes, self.decoder)
        nested = decoded.view(-1, codes.n_tokens, decoded.shape[1])
        if self.nesting:
            for lower, part in pairwise(nested[:-1].unbind()):
                part += lower
            decoded = torch.cat([nested[self.nesting.main], nested[-1]])
        G, residual, squares = self.ops.errors(
            decoded, self.b_dec, made.wanted, made.kept, rows.some
        )
        mean = self.group.all_reduce(residual.sum(0)) / rows.n_some.clamp(min=1)
        self.ops.spread(residual, mean, rows.some, squares)
        least = choice.main.least, choice.aux.least
        figures, scales = self.ops.terms(
            *self._over_processes(squares.sum(1), own.value.sum(), own.n_pairs),
            *least, choice.aux_total, rows.n, self.weighting,
        )  # fmt: skip
        G.view(2, -1).mul_(scales[:2, None])
        if self.nesting:
            figures, G = self._with_nested(rows, nested[:-1], self.nesting.main, figures, G)
        return figures, G, scales[2]

    def _with_nested(
        self, rows: Rows, nested: Tensor, main: int, figures: Tensor, G: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both with the loss of the other nested reconstructions (M, N, D), which have no bias yet.
        A group's gradient is the sum of those of all reconstructions that it is in."""
        error = torch.cat([nested[:main], nested[main + 1 :]])
        error += self.b_dec
        error -= rows.made.wanted
        error.masked_fill_(~rows.made.kept[:, None], 0.0)
        share = 1 / (len(error) * rows.n.clamp(min=1))
        kind_loss = self.group.all_reduce(share * error.square().sum())
        place = torch.arange(len(figures), device=figures.device)
        figures = figures + torch.where((place == 0) | (place == KIND_LOSS), kind_loss, 0.0)
        error *= 2 * share
        whole, of_aux = G.view(2, 1, *error.shape[1:])
        G = torch.cat([error[:main], whole, error[main:], of_aux])
        for higher, lower in pairwise(reversed(G[:-1].unbind())):
            lower += higher
        return figures, G.flatten(0, 1)

    def _over_processes(self, *numbers: Tensor) -> Sequence[Tensor]:
        """The sums of all processes, in one message."""
        if self.group.is_single:
            return numbers
        sums = [number.clone() for number in numbers]
        self.group.all_reduce_(sums)
        return sums

    def _gradients(
        self, rows: Rows, codes: Codes, own: Own, G: Tensor, by_l1: Tensor
    ) -> tuple[Gradients, Tensor]:
        """To the rows of the weights, not projected, and (D,) the sum of those to the
        reconstructions; of all processes."""
        made, d_value = rows.made, self.ops.sampled(codes, G, self.decoder)
        if self.weighting.l1:
            d_value[: self.n_pairs] += torch.where(own.column < self.sae.spec.d_sae, by_l1, 0.0)
        read = (G, made.x) if self.is_exact else (G.bfloat16(), made.half)
        found = self.ops.gradients(codes, d_value, *read, self.sae.spec.d_sae)
        by_x_hat = G[: len(made.x)].sum(0)
        self.group.all_reduce_([*found, by_x_hat])
        return found, by_x_hat

    def _update(
        self,
        rows: Rows,
        choice: Choice,
        figures: Tensor,
        gradients: Gradients,
        b_dec: Tensor,
    ) -> Tensor:
        """Clip, and move the weights if everything is finite; gives 1 if they were moved."""
        W_dec, W_enc, b = gradients
        b_enc = b.sum(0)
        if not self.sae.spec.target_hook_name:
            b_dec = b_dec - self.W_enc.T @ b[0]
        along, squares = self.ops.squares(W_dec, self.W_dec, W_enc)
        squared = torch.cat([squares, b_enc.square(), b_dec.square()]).sum()
        own = self.lr, self.halted, self.counts, self.at, self.record
        facts = Facts(rows.finite, choice.sure, *own, MAX_GRADIENT_NORM, self.rule)
        scalars = self.ops.decide(figures, squared, facts)
        first, second, third, fourth = self.moments
        rule, for_b_dec = self.rule, self.rule._replace(only_active=False)
        of_decoder = along, scalars, self.directions
        self.ops.move_encoder(self.W_enc, W_enc, first, scalars, self.factors, rule)
        self.ops.move_vector(self.b_enc, b_enc, second, scalars, rule)
        self.ops.move_decoder(self.W_dec, W_dec, third, *of_decoder, rule)
        self.ops.move_vector(self.b_dec, b_dec, fourth, scalars, for_b_dec)
        return scalars[3]

    def _note_activity(self, own: Own, taken: Tensor) -> None:
        """Count one more batch, as `record_activity` does, if the step was taken."""
        sae = self.sae
        fired = torch.zeros(sae.spec.d_sae + 1, dtype=torch.bool, device=taken.device)
        fired = fired.index_fill_(0, own.column.long(), True)[:-1]
        if not self.group.is_single:
            fired = self.group.all_reduce(fired.int()) > 0
        fired = fired & (taken > 0)
        sae.ever_fired |= fired
        sae.num_batches_not_active += taken.long()
        sae.num_batches_not_active *= ~fired
