"""The batches of a training and of its validation, and how they are made."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.activations.clean_pass import CleanPass, ReadWindows
from sae_core.activations.store import ActivationSource
from sae_core.distributed.process_group import ProcessGroup
from sae_core.sae.config import SAESpec
from sae_core.sae.normalisation import Normalisation
from sae_core.trainer.end_to_end import EndToEnd
from sae_core.utils.errors import SAEError

MEASURED_BATCHES = 8
"""Batches that the mean, the scale and the median norm are measured on."""


class Batch(NamedTuple):
    """The tokens of one step."""

    x: Tensor
    """(N, D) activations as they enter the SAE, outliers left out."""
    n_outliers: int = 0
    passes: Sequence[CleanPass] | None = None
    """In the end-to-end phase, the windows of this process that are spliced; before it, None."""
    spliced: Tensor | None = None
    """(n,) bool: which of this process's tokens are those of `passes`; None: all."""
    finite: bool = True
    """No activation is infinite or NaN."""
    target: Tensor | None = None
    """(N, D) of a transcoder: the target, centred and scaled like x."""
    shard: slice = slice(None)
    """The tokens that this process works on."""

    def part(self) -> "Batch":
        """The same with this process's tokens alone."""
        target = self.target
        return self._replace(
            x=self.x[self.shard], target=None if target is None else target[self.shard]
        )

    def of_spliced(self, rows: Tensor) -> Tensor:
        """Those of this process's rows (n, D) that are of spliced tokens."""
        return rows if self.spliced is None else rows[self.spliced]

    @property
    def wanted(self) -> Tensor:
        """(N, D) what is to be reconstructed."""
        return self.x if self.target is None else self.target


class Batches:
    """Makes the batches of one training: shuffled activations, and whole windows in the end-to-end
    phase.

    Args:
        spec: of the SAE that they are for.
        device: it is on.
        source: of raw activations.
        num_epochs: of the training.
        end_to_end: the losses of the end-to-end phase, whose model runs its windows; None without.
        group: the processes that share each batch.
    """

    def __init__(
        self,
        spec: SAESpec,
        device: torch.device,
        source: ActivationSource,
        num_epochs: int,
        end_to_end: EndToEnd | None,
        group: ProcessGroup,
    ) -> None:
        self.spec, self.device, self.source = spec, device, source
        self.end_to_end, self.group = end_to_end, group
        self.n_steps = num_epochs * source.steps_per_epoch
        self.n_local_steps = self.n_steps - (end_to_end.n_steps(self.n_steps) if end_to_end else 0)
        """Steps before the end-to-end phase."""
        self.measured: Normalisation | None = None
        """How activations enter the SAE; measured on the first batches."""

    @property
    def normalise(self) -> Normalisation:
        assert self.measured is not None, "no batch has been made yet"
        return self.measured

    @property
    def phase(self) -> EndToEnd:
        assert self.end_to_end is not None, "this training has no end-to-end phase"
        return self.end_to_end

    def train(self, epoch: int, skip: int, raw: bool = False) -> Iterator[Batch | Tensor]:
        """The batches of an epoch (from 0), the first `skip` left out; if `raw`, those of shuffled
        activations as they are in the source."""
        source, length = self.source, self.source.steps_per_epoch
        n_local = min(max(self.n_local_steps - epoch * length, 0), length)
        local = source.train_batches(epoch, n_local, skip=skip)
        if self.measured is None:
            local = self._measure(local)
        yield from local if raw else map(self.of_activations, local)
        for number in range(max(skip, n_local), length):
            indices = source.windows_of(epoch, number)
            yield self._of_windows(self.phase.windows.train(source.pass_of(epoch), indices))

    def validation(self, in_phase: bool) -> Iterator[Batch]:
        """The batches that the validation loss is measured on."""
        if not in_phase:
            return map(self.of_activations, self.source.validation_batches())
        windows = map(self.phase.windows.validation, self.source.validation_windows())
        return map(self._of_windows, windows)

    def calibration(self) -> Iterator[Tensor]:
        """(N, D) the activations that the inference threshold is calibrated on."""
        for raw in self.source.calibration_batches():
            x, _ = self.normalise.pair(raw)
            yield x

    def _measure(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Measure on the first of `batches` how activations enter the SAE; gives all of them."""
        sample = list(islice(batches, MEASURED_BATCHES))
        measured = sample or list(self.source.train_batches(0, MEASURED_BATCHES))
        finite = [raw for raw in measured if raw.isfinite().all()]
        if measured and not finite:
            raise not_finite(self.spec, "activations", len(measured))
        rows = torch.cat(finite).to(self.device, torch.float32)
        parts = rows.split(self.spec.d_in, dim=1)
        self.measured = Normalisation.of_sites(map(Normalisation.measure, parts))
        return chain(sample, batches)

    def of_activations(self, raw: Tensor) -> Batch:
        """From (N, D) raw activations, or (N, 2 D) for a transcoder."""
        x, target = self.normalise.pair(raw)
        n_outliers = len(raw) - len(x)  # what is not finite is among them
        finite = n_outliers == 0 or bool(raw.isfinite().all())
        shard = self.group.shard(len(x)) if len(x) else slice(0)
        return Batch(x, n_outliers, finite=finite, target=target, shard=shard)

    def _of_windows(self, tokens: Tensor) -> Batch:
        """From windows (W, L) of tokens.

        Each process runs its shard of the windows through the model. Their activations are gathered
        into the batch that all have, of which a process's tokens are those of its own windows.
        """
        normalise, group = self.normalise, self.group
        own = group.shard(len(tokens))
        spliced = self.phase.spliced(len(tokens))[own]
        norms = normalise.max_norm, normalise.output.max_norm
        read, passes = self.phase.read(tokens[own], spliced, *norms)
        parts = group.all_gather(torch.cat([part.x[part.kept].float() for part in read]))
        first, end = (sum(map(len, parts[:r])) for r in (group.rank, group.rank + 1))
        target = None
        if normalise.target:
            raw = torch.cat([part.target[part.kept].float() for part in read])
            target = normalise.target.scaled(torch.cat(group.all_gather(raw)))
        seen = [at[:, 1:] for part in read for at in (part.x, part.target)]
        n_infinite = group.total(sum(not bool(at.isfinite().all()) for at in seen))
        return Batch(
            normalise.scaled(torch.cat(parts)),
            group.total(sum(part.n_outliers for part in read)),
            passes,
            None if spliced.all() else _tokens_of(spliced, read),
            finite=n_infinite == 0,
            target=target,
            shard=slice(first, end),
        )


def _tokens_of(windows: Tensor, read: Sequence[ReadWindows]) -> Tensor:
    """(n,) bool: which of the tokens that train the SAE are those of some windows (W,)."""
    kept = torch.cat([part.kept for part in read])
    return windows.to(kept.device)[:, None].expand_as(kept)[kept]


def not_finite(spec: SAESpec, what: str, n_batches: int) -> SAEError:
    """The error of a training whose activations or loss (`what`) are infinite or NaN."""
    dtype = spec.metadata.get("model_dtype", "its number format")
    advice = "use --model-dtype bfloat16 or float32, or another layer"
    if what == "loss":
        advice = "lower --lr, or use --model-dtype float32"
    return SAEError(
        f"{spec.hook_spec}: {what} not finite in {n_batches} batches in a row, with the "
        f"language model in {dtype}; {advice}; the checkpoints stay as they were"
    )
