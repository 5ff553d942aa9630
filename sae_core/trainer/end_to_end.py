"""End-to-end losses: what the language model does with a reconstruction in place of the activation.

    logit_kl = mean over positions of KL(p_clean || p_spliced), in nats
    <layer>_mse = mean over tokens and dimensions of the squared difference that the splice makes to
                  the residual after a later layer; total_post_layer_mse is their sum
    loss = logit_kl_weight * logit_kl + block_mse_weight * total_post_layer_mse

(Braun et al., "Identifying Functionally Important Features with End-to-End Sparse Dictionary
Learning", arXiv 2405.12241). The model runs once unmodified; the spliced pass begins at the hook
and gets the reconstruction there, except at a window's first position, at excluded tokens and at
outliers, which keep their own activation in both passes and train nothing. The KL counts every
position but a window's first, where nothing can change; the layers' error counts the spliced
tokens.

Run for the last steps of a training only, the two terms are balanced when this phase begins
(Karvonen, "Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need",
arXiv 2503.17272): at its default weight a term's gradient at the reconstruction is as long as that
of the reconstruction error.

With `end_to_end_stride` k, one window in k of a batch is spliced, and the means above are over
these windows. The windows of a batch come in a random order, so this is a random sample: in
expectation, losses and gradients are those of all windows. The others only run up to the hook.

A transcoder's output is spliced in at its target, and what is said of the activation at the hook
then holds for that at the target.

Shapes: B windows in a forward pass, L positions, D activation width, N tokens that train the SAE.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sae_core.activations.clean_pass import (
    CleanPass,
    Reader,
    ReadWindows,
    clean_pass,
    read_windows,
)
from sae_core.activations.token_windows import TokenWindows
from sae_core.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from sae_core.models.language_model import Hook, LanguageModel
from sae_core.sae.losses import KnownGradient, unembedded_kl
from sae_core.train_config import BatchSize, EndToEndConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.memory import Microbatch, Result

ModelOrLoad = LanguageModel | Callable[[], LanguageModel]
"""A language model, or what loads it."""

CONTRIBUTIONS = {
    "logit_kl": "kl_contribution",
    "total_post_layer_mse": "block_mse_contribution",
}
"""The two terms, and what each is called with its weight."""

DEFAULT_WEIGHTS = {
    "logit_kl": EndToEndConfig.logit_kl_weight,
    "total_post_layer_mse": EndToEndConfig.block_mse_weight,
}


class EndToEnd:
    """The end-to-end losses of one SAE. `later_layers` checks its settings beforehand.

    Args:
        model: or a function that loads it, which is called when the phase begins.
        windows: those that the SAE's activations are of.
        batch_size: windows in a forward pass; see `LanguageModel.windows_at_once`.
        target: of a transcoder.
        group: the processes that share the training, each with its own windows.
        shared: what runs windows through the unmodified model for several SAEs at once.
    """

    def __init__(
        self,
        model: ModelOrLoad,
        windows: TokenWindows,
        hook: Hook,
        config: EndToEndConfig,
        batch_size: BatchSize,
        target: Hook | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
        shared: Reader | None = None,
    ) -> None:
        self.shared = shared
        self._given, self.windows, self.hook, self.config = model, windows, hook, config
        self.target, self.group, self.batch_size = target or hook, group, batch_size
        self.weights = _weights(config)

    @cached_property
    def model(self) -> LanguageModel:
        """The language model, which takes no memory before the phase."""
        return self._given if isinstance(self._given, LanguageModel) else self._given()

    @cached_property
    def microbatch(self) -> Microbatch:
        """Windows in a forward pass."""
        return self.model.forward_microbatch(self.windows.length, self.batch_size)

    @cached_property
    def later(self) -> list[Hook]:
        """Where the later layers' errors are taken."""
        layers = later_layers(self.config, self.target, self.model.n_layers)
        return [Hook(layer, "hook_resid_post") for layer in layers]

    def clean(
        self, tokens: Tensor, max_norm: float, target_max_norm: float = math.inf
    ) -> list[CleanPass]:
        """Run windows (W, L) through the model, some at a time.

        Tokens whose activation is longer than `max_norm`, or at the target longer than
        `target_max_norm`, are outliers.
        """
        max_norms = {self.target: target_max_norm} | {self.hook: max_norm}

        def run(at: slice) -> CleanPass:
            hooks = self.hook, self.target, self.later
            excluded = self.windows.excluded
            return clean_pass(self.model, tokens[at], *hooks, max_norms, self.shared, excluded)

        return list(self.microbatch.parts(len(tokens), run))

    def read(
        self,
        tokens: Tensor,
        spliced: Tensor,
        max_norm: float,
        target_max_norm: float = math.inf,
    ) -> tuple[list[ReadWindows], list[CleanPass]]:
        """Run windows (W, L) up to the hook, and the `spliced` ones, (W,) bool, through the whole
        model. The norms as in `clean`."""
        if spliced.all():
            passes = self.clean(tokens, max_norm, target_max_norm)
            return [part.read for part in passes], passes
        max_norms = {self.target: target_max_norm} | {self.hook: max_norm}

        def run(at: slice) -> ReadWindows:
            excluded = self.windows.excluded
            hooks = self.hook, self.target
            return read_windows(self.model, tokens[at], *hooks, max_norms, self.shared, excluded)

        read = list(self.microbatch.parts(len(tokens), run))
        passes = self.clean(tokens[spliced], max_norm, target_max_norm)
        # Rounding depends on the pass: near the limit only one of the two might keep a token.
        kept = torch.cat([part.kept for part in read])[spliced.to(read[0].kept.device)]
        parts = kept.split([len(part.tokens) for part in passes])
        return read, [p._replace(kept=k) for p, k in zip(passes, parts, strict=True)]

    def spliced(self, n_windows: int) -> Tensor:
        """(n_windows,) bool: the windows of a batch that have the end-to-end losses."""
        return torch.arange(n_windows) % self.config.end_to_end_stride == 0

    @cached_property
    def _names(self) -> list[str]:
        """The figures of `loss`."""
        errors = [f"{point.layer}_mse" for point in self.later]
        terms = ["logit_kl"] * self.config.use_logit_kl
        terms += [*errors, "total_post_layer_mse"] * self.config.use_block_mse
        return terms + [CONTRIBUTIONS[name] for name in self.weights]

    def n_steps(self, of: int) -> int:
        """Steps with end-to-end losses, when there are `of` steps in all."""
        return max(1, round(self.config.end_to_end_fraction * of))

    def loss(
        self, passes: Sequence[CleanPass], x_hat: Tensor, n_batch: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for raw reconstructions (N, D) of the tokens of `passes`, a scalar with a
        gradient to `x_hat`, and its parts by name, scalars for the record.

        Args:
            n_batch: this process's tokens in the batch, also those that are not spliced; by
                default N.
        """
        n = len(x_hat) if n_batch is None else n_batch
        return self._loss(passes, x_hat, n / self.group.total(n), self.weights)

    def balance(
        self,
        passes: Sequence[CleanPass],
        x_hat: Tensor,
        pull: float,
        n_batch: int | None = None,
    ) -> None:
        """Scale the weights so that at its default a term has a gradient of length `pull` at the
        raw reconstructions `x_hat` (N, D), those of all processes together.

        The gradient of a mean over some of a batch's tokens is longer than that of the mean over
        all, since each counts for more: by the square root of the ratio of their numbers. The
        weights are those that balance the mean over all. `n_batch` as in `loss`.
        """
        n = len(x_hat) if n_batch is None else n_batch
        n_all = self.group.total(n)
        share, spliced = n / n_all, self.group.total(len(x_hat)) / n_all
        for name, weight in _weights(self.config).items():
            at = x_hat.detach().requires_grad_()
            alone = {other: float(other == name) for other in self.weights}
            [gradient] = torch.autograd.grad(self._loss(passes, at, share, alone)[0], at)
            length = float(self.group.all_reduce((share * gradient).pow(2).sum()).sqrt())
            length *= math.sqrt(spliced)
            balanced = pull / length if length else 0.0  # a splice that changes nothing
            self.weights[name] = weight / DEFAULT_WEIGHTS[name] * balanced

    def _loss(
        self,
        passes: Sequence[CleanPass],
        x_hat: Tensor,
        share: float,
        weights: dict[str, float],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Value and gradient, a forward pass's windows at a time."""
        wanted = x_hat.requires_grad and torch.is_grad_enabled()
        # The processes' losses are added by their share of the tokens, so that the positions and
        # tokens that a mean is over have that share, too.
        own_positions = sum(part.tokens[:, 1:].numel() for part in passes)
        n_positions = self.group.total(own_positions) * share
        n_tokens = self.group.total(len(x_hat)) * share
        figures = dict.fromkeys(self._names, x_hat.new_zeros(()))
        gradients: list[Tensor] = [x_hat.new_zeros(0, x_hat.shape[1])]

        def splice(part: CleanPass, rows: Tensor) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
            rows = rows.detach().requires_grad_(wanted)
            sums = self._splice(part, rows, n_positions, n_tokens)
            for name, weight in weights.items():
                sums[CONTRIBUTIONS[name]] = weight * sums[name]
            loss = torch.stack([sums[CONTRIBUTIONS[name]] for name in weights]).sum()
            return sums, torch.autograd.grad(loss, rows) if wanted else ()

        for sums, gradient in self._in_parts(passes, x_hat, splice):
            gradients.extend(gradient)
            for name, value in sums.items():
                figures[name] = figures[name] + value.detach()
        loss = torch.stack([figures[CONTRIBUTIONS[name]] for name in weights]).sum()
        return KnownGradient.apply(x_hat, loss, torch.cat(gradients)) if wanted else loss, figures

    def _in_parts(
        self,
        passes: Sequence[CleanPass],
        x_hat: Tensor,
        work: Callable[[CleanPass, Tensor], Result],
    ) -> Iterator[Result]:
        """`work` on the windows of `passes` and their reconstructions, as many as there is memory
        for at a time."""
        parts = x_hat.split([part.n_tokens for part in passes])
        for part, rows in zip(passes, parts, strict=True):
            ends = [0, *part.kept.flatten(1).sum(1).cumsum(0).tolist()]

            def on_some(
                at: slice,
                part: CleanPass = part,
                rows: Tensor = rows,
                ends: Sequence[int] = ends,
            ) -> Result:
                return work(part.at(at), rows[ends[at.start] : ends[at.stop]])

            yield from self.microbatch.parts(len(part.tokens), on_some)

    def _splice(
        self, part: CleanPass, rows: Tensor, n_positions: float, n_tokens: float
    ) -> dict[str, Tensor]:
        """What some windows with the reconstructions `rows` (n, D) add to the terms, each a mean
        over all the `n_positions` or `n_tokens` of a batch."""
        value = part.target.to(rows.dtype).masked_scatter(part.kept[..., None], rows)
        hidden, later = self.model.resume_hidden(
            part.tokens, part.residual, self.target, value, self.later
        )
        terms: dict[str, Tensor] = {}
        if self.config.use_logit_kl:
            clean, spliced = (h[:, 1:].flatten(0, 1) for h in (part.hidden, hidden))
            terms["logit_kl"] = unembedded_kl(self.model.unembed, clean, spliced) / n_positions
        if self.config.use_block_mse:
            errors = {
                f"{point.layer}_mse": _squared_difference(
                    later[point][part.kept], part.later[point][part.kept]
                )
                / n_tokens
                for point in self.later
            }
            terms |= errors | {"total_post_layer_mse": torch.stack([*errors.values()]).sum()}
        return terms


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    """Summed over tokens, a mean over dimensions, both (n, D)."""
    return (a.float() - b.float()).pow(2).mean(-1).sum()


def later_layers(config: EndToEndConfig, hook: Hook, n_layers: int) -> list[int]:
    """The layers whose error counts, in order; none where block MSE is not used.

    Raises:
        SAEError: a layer is not after the hook, or no layer is.
    """
    if not (config.use_end_to_end and config.use_block_mse):
        return []
    first = hook.layer + (hook.hook_name == "hook_resid_post")
    after = range(first, n_layers)
    if not after:
        raise SAEError(
            f"--use-block-mse: no layer comes after {hook.spec}, the model's last; use "
            "--no-use-block-mse, or another hook"
        )
    for layer in config.block_mse_layers:
        if layer not in after:
            raise SAEError(
                f"--block-mse-layers {layer}: the layers after {hook.spec} are {first} to "
                f"{n_layers - 1}"
            )
    return sorted(set(config.block_mse_layers)) or list(after)


def _weights(config: EndToEndConfig) -> dict[str, float]:
    """The weight of each term that is used."""
    weights = {}
    if config.use_logit_kl:
        weights["logit_kl"] = config.logit_kl_weight
    if config.use_block_mse:
        weights["total_post_layer_mse"] = config.block_mse_weight
    return weights
